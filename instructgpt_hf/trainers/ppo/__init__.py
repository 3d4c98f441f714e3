"""Stage 3: PPO and PPO-ptx."""
