"""One program for all experiments: from images to a trained, sampled and measured diffusion."""
