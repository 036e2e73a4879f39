"""Peers in one run: what vLLM and SGLang have of their own, LMCache, and ours, asked for the same prompts in turns.

__main__   one command: plan, stages, judgements, results
plan       profiles: which workloads, how long, and what that will take
names      what the contestants are called
prompts    the workloads' prompts
side       what a contestant is; what its processes used
vllm_sides, sglang_sides, lmcache_server    the contestants
vllm_cpu_offload, lmcache_on_cpu            what two peers need on a CPU; imported inside the engine's process
long_model                                  what prompts beyond SmolLM2's context are asked of
driver     asks all sides in turns, and goes on without one that fails
record     what was measured, written as it goes
stage      one engine's sides, in that engine's environment
intervals  what a figure and its interval say about a limit
judge      what was promised, and whether it holds
report, plots                               RESULTS.md and its page of plots
"""
