"""Scaling language-image pre-training by masking: the trainer (`flipscale VERB`) and the models (`flipscale.model`)."""

__version__ = "0.1.0"
