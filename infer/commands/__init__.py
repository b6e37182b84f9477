"""The subcommands of `jaxkv`, a file each: `add_options` declares, `run` runs."""
