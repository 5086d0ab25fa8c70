"""What a model does on examples, and the scores that follow from it.

Nothing is imported here, so that the limits in `ask` are at hand without torch.
"""
