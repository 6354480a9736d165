"""The paper's experiments on a synthetic corpus, and what they say of its claims."""
