"""Commands: options, printed output and exit status. The work is done by `molcli.api`."""
