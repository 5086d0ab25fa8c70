"""Whole runs: recipes, workspaces, the main job and its single steps, and the demo."""
