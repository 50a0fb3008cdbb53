"""PPO of Stable-Baselines3 on eight copies that step in one call, beside the planner it steers."""

import sys

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from ndp_gym.sb3 import make_sb3_env

torch.set_num_threads(1)
envs, held_out = (
    VecNormalize(make_sb3_env(num_envs=8, action="knobs", max_windows=16, split=split), training=on)
    for split, on in (("train", True), ("val", False))
)
held_out.obs_rms, held_out.norm_reward = envs.obs_rms, False
# Actions of 0 leave the planner's constants alone, which are good: explore near them.
noise = {"log_std_init": -2.0}
model = PPO("MultiInputPolicy", envs, n_steps=32, gamma=0.5, policy_kwargs=noise, seed=0)
for n_steps in (0, int(sys.argv[1]) if len(sys.argv) > 1 else 4096):
    model.learn(n_steps)
    held_out.seed(0)  # the same episodes both times
    mean, std = evaluate_policy(model, held_out, n_eval_episodes=32)
    print(f"{n_steps} steps: return of 16 windows on unseen conversations {mean:.3f} ± {std:.3f}")
