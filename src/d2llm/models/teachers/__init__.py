"""Everything that reads query and passage together and gives log-odds, and its prompts."""
