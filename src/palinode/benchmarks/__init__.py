"""Benchmarks, one file each: what is trained, what is forgotten, what is known of the truth."""

from palinode.benchmarks.demo import STAGES, DemoModels, Stage, build_demo, tiny_model

__all__ = ["STAGES", "DemoModels", "Stage", "build_demo", "tiny_model"]
