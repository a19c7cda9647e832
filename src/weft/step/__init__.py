"""What happens in a step: state, forward, update, evaluation. Takes the state of a run, never the run."""
