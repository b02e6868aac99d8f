"""The DeepSpeed dict for a run: stage, offload, buckets, precision.

The 2023 kit shipped five JSON files whose live-parameter limits of 1e3 elements made every gather tiny; here the limits are fields of the
run with DeepSpeed's own sizes as defaults.
"""


def deepspeed_config(config, trainer):
    """`trainer`: HF's trainer fills in the batch keys ("auto") and brings the optimizer; else our loop steps by itself."""
    zero = {"stage": config.zero_stage, "reduce_bucket_size": config.bucket_size, "allgather_bucket_size": config.bucket_size,
            "overlap_comm": config.overlap_comm, "contiguous_gradients": True}
    device = {"device": "cpu", "pin_memory": config.pin_memory}
    if config.offload != "none":
        zero["offload_optimizer"] = device
    if config.offload == "all":
        zero["offload_param"] = device
    if config.zero_stage == 3:
        zero |= {"stage3_max_live_parameters": config.max_live_parameters, "stage3_prefetch_bucket_size": config.bucket_size,
                 "stage3_gather_16bit_weights_on_model_save": True}
    batch = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto") if trainer else \
        {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    made = {**batch, "gradient_clipping": config.max_grad_norm, "zero_optimization": zero, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False, "steps_per_print": 1 << 30, "wall_clock_breakdown": False,
            "bf16": {"enabled": config.dtype == "bfloat16"}, "fp16": {"enabled": config.dtype == "float16"}}
    if trainer and config.dtype == "mixed":         # float32 weights stay; PPO opens its own autocast
        made["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return made
