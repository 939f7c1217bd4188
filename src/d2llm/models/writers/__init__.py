"""Writers: models that write queries for passages, and their prompts."""
