"""LightningModules, compared with Lightning's own Trainer."""
