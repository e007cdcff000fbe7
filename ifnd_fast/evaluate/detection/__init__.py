"""COCO detection and instance segmentation from a backbone."""
