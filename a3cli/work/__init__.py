"""One run: its work folder, files, processes, signals and machine."""
