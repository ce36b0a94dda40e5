"""The command line: commands, options, and what a person sees."""
