"""What happens in a step: state, forward, update, evaluation. Takes the state of a state, never the run."""
