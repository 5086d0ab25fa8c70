"""Whole runs: recipes, workspaces, the main job and what is done with its results, and the demo."""
