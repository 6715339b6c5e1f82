"""The subcommands of `neo`: each module has `add(subparsers)` and `run(arguments) -> exit code`."""
