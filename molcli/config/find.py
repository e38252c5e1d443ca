"""Find a recipe by path, or by the name of one that ships with the package."""

from pathlib import Path

from molcli.config.typed import nearest
from molcli.errors import MolError

# Built wheels carry the recipes inside the package; in a source checkout they lie beside it.
_FOLDERS = (
    Path(__file__).parent.parent / "recipes",
    Path(__file__).parent.parent.parent / "recipes",
)


def bundled_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that ships with the package, sorted by name."""
    for folder in _FOLDERS:
        if files := sorted(folder.glob("*.yaml"), key=lambda file: file.stem):
            return {file.stem: file for file in files}
    return {}


def find_recipe(name: str) -> Path:
    """The file that `--recipe` means: a path, or a bundled name with or without .yaml.

    Raises MolError, naming the nearest bundled recipe and all of them.
    """
    path = Path(name)
    if path.is_file():
        return path
    bundled = bundled_recipes()
    stem = path.name.removesuffix(".yaml")
    # `recipes/demo.yaml` works away from the source tree, too: it is how the README writes it.
    if path.parent in (Path(), Path("recipes")) and stem in bundled:
        return bundled[stem]
    guess = nearest(stem, list(bundled))
    found = f"recipe `{name}` is a folder" if path.is_dir() else f"there is no recipe `{name}`"
    raise MolError(
        found,
        allowed=f"a .yaml file, or one of: {', '.join(bundled)}",
        hint=f"--recipe {guess}" if guess else "",
    )
