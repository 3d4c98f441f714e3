"""What single scripts train and measure on: models, data and trainers."""
