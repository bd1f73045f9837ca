"""`minigpt serve`: a model behind an HTTP endpoint in OpenAI's style, many requests computed together, and a page."""
