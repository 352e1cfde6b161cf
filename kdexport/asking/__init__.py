"""Ask a language model behind an endpoint for the labels of some texts, within a limit of calls, and choose which."""
