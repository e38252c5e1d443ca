"""`python -m molcli` is the `molcli` command."""

from molcli.cli.main import main

main()
