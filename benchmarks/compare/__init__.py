"""Peers in one run: what vLLM and SGLang have of their own, LMCache, and ours, asked for the same prompts in turns.

plan       profiles: which workloads, how long, and what that will take
prompts    the workloads' prompts
side       what a contestant is; what its processes used
vllm_sides, sglang_sides, lmcache_server    the contestants
vllm_cpu_offload, lmcache_on_cpu            what two peers need on a CPU; imported inside the engine's process
driver     asks all sides in turns, and goes on without one that fails
stage      one engine's sides, in that engine's environment
judge      what was promised, and whether it holds
report     RESULTS.md and the page of plots
"""
