"""The stages that commands run: calibrate, solve, export, verify, evaluate, plan, pareto, run."""
