"""Everything that draws: tables, charts and pages."""
