"""Many runs that search for the best."""
