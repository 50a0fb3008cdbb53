"""A plain Gymnasium loop: random plans, one decode window after the other."""

import gymnasium as gym

import ndp_gym  # noqa: F401  registers the environment

env = gym.make("NDPPlacement-v0", batch_size=8, window=16, hbm_budget=0.10, max_windows=16)
env.action_space.seed(0)
observation, info = env.reset(seed=0)
total, is_over = 0.0, False
while not is_over:
    action = env.action_space.sample()  # here an agent would look at the observation
    observation, reward, terminated, truncated, info = env.step(action)
    total += float(reward)
    is_over = terminated or truncated
    speed = info["tokens"] / info["decode_s"]
    print(f"{speed:6.0f} tokens/s  loss {info['delta_nll_nats']:.3f} nats  reward {reward:+.3f}")
print(f"return {total:.3f}")
