"""Fine-tuning: loss functions, one plain loop, and the function that turns a checkpoint into another.

Nothing is imported here, so that `settings` is at hand without torch.
"""
