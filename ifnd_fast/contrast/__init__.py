"""Contrastive learning: encoders, MoCo and its in-batch cousin, the queue, the loss."""
