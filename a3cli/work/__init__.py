"""The parts of one run: its work folder, files, processes, signals and machine."""
