"""Teachers: models that read query and passage together and return log-odds, and their prompts."""
