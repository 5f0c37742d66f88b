"""Benchmarks: many short trainings with the exact verdict on each, the time of the losses, and the quickstart per divergence.

    TrialSpec -> learner.trial.run_trial -> TrialResult -> one row of rows.json -> tables and plots

Nothing here imports the learner: trials reach it through `ftb_llm.launch`, like everything that the command line starts.
"""
