"""The two PPO trainers of benchmarks/ppo.py, each in a process and an environment of its own."""
