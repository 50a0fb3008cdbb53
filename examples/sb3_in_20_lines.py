"""PPO of Stable-Baselines3 on eight copies that step in one call; give it more steps to learn."""

import sys

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from ndp_gym.sb3 import make_sb3_env

N_STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
torch.set_num_threads(1)
envs = VecNormalize(make_sb3_env(num_envs=8, action="knobs", max_windows=16), norm_reward=False)
model = PPO("MultiInputPolicy", envs, n_steps=32, batch_size=64, gamma=0.5, seed=0, verbose=1)
model.learn(N_STEPS)

held_out = VecNormalize(make_sb3_env(num_envs=8, action="knobs", max_windows=16, split="val"))
held_out.obs_rms, held_out.training, held_out.norm_reward = envs.obs_rms, False, False
mean, std = evaluate_policy(model, held_out, n_eval_episodes=8)
print(f"return of 16 windows on unseen conversations: {mean:.3f} ± {std:.3f}")
