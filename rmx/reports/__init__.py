"""Tables, pictures and pages of a finished run."""
