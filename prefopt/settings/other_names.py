"""Names of our settings in TRL, transformers' TrainingArguments, axolotl, LLaMA-Factory, open-instruct, and before.

Used to answer an unknown setting, given as a flag or a YAML key, with or without a group before it.
"""

from __future__ import annotations

from collections.abc import Collection

# Our setting, with a value where the other name implies one -> the other names.
_TABLE: dict[str, str] = {
    # model and reference
    "model.path": "model_name_or_path model_name model_id base_model pretrained_model_name_or_path model.name policy "
    "policy_model model_path pretrain",
    "model.revision": "model_revision revision_of_model",
    "model.dtype": "torch_dtype dtype precision model_dtype",
    "model.attention": "attn_implementation attention_implementation flash_attention flash_attn use_flash_attn "
    "use_flash_attention_2 sdp_attention attn_impl",
    "model.quantize nf4": "load_in_4bit load_in_8bit quantization_bit use_qlora qlora bnb_4bit_quant_type "
    "quantization_config",
    "model.compute_dtype": "bnb_4bit_compute_dtype",
    "model.gradient_checkpointing": "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
    "disable_gradient_checkpointing",
    "model.offload_activations": "activation_offloading",
    "model.trust_remote_code": "trust_remote_code trust_remote",
    "reference.path": "ref_model ref_model_name_or_path reference_model reference_model_name_or_path ref_model_path "
    "ref_policy reference_model_path",
    "reference.cache logps": "precompute_ref_log_probs precompute_ref_logps precompute_ref_batch_size "
    "reference_logprobs_cache_path cache_logprobs",
    "reference.sync_every": "sync_ref_model ref_model_sync_steps reference_update_steps",
    "reference.sync_weight": "ref_model_mixup_alpha reference_polyak_update alpha_ref",
    # adapters
    "lora.r": "lora_r lora_rank lora_dim use_lora use_peft peft adapter finetuning_type lora rank peft_lora_r",
    "lora.alpha": "lora_alpha peft_lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target_modules lora_target lora_target_linear target_modules",
    "lora.modules_to_save": "lora_modules_to_save additional_target modules_to_save",
    "lora.use_rslora": "use_rslora peft_use_rslora",
    "lora.merge": "merge_lora merge_adapter",
    # data
    "data.train": "dataset_name dataset datasets dataset_path train_file train_data train_dataset data_path "
    "dataset_mixer dataset_mixer_list dataset_train data_files train_files dataset_dir",
    "data.eval": "eval_dataset eval_file validation_file val_data test_datasets eval_data dataset_eval_mixer "
    "dataset_mixer_eval_list validation_split test_file",
    "data.eval_fraction": "val_size val_set_size test_size eval_split_ratio validation_fraction",
    "data.weights": "interleave_probs dataset_weights mixing_probs",
    "data.columns": "dataset_kwargs column_mapping",
    "data.max_length": "max_length max_seq_length max_seq_len cutoff_len sequence_len model_max_length block_size "
    "max_len seq_len context_length",
    "data.chat_template": "chat_template template chat_template_path conversation_template",
    # optimizer
    "optim.lr": "learning_rate lr peak_lr max_lr base_lr lrate",
    "optim.schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler scheduler_type lr_scheduler_kwargs",
    "optim.warmup_ratio": "warmup_ratio warmup_fraction",
    "optim.warmup_steps": "warmup_steps num_warmup_steps lr_warmup_steps warmup",
    "optim.weight_decay": "weight_decay wd",
    "optim.clip": "max_grad_norm gradient_clipping grad_clip clip_grad_norm max_norm gradient_clip_val",
    "optim.name": "optimizer optimizer_type optim_type optimizer_name",
    "optim.args": "optim_args adam_beta1 adam_beta2 adam_epsilon optimizer_kwargs betas eps",
    # the loop
    "train.micro_batch": "per_device_train_batch_size micro_batch_size per_device_batch_size micro_train_batch_size "
    "train_micro_batch_size_per_gpu device_batch_size batch_size_per_device",
    "train.global_batch": "gradient_accumulation_steps batch_size train_batch_size total_batch_size global_batch_size "
    "batch effective_batch_size accumulation_steps grad_accum_steps gradient_accumulation",
    "train.epochs": "num_train_epochs num_epochs epochs n_epochs max_epochs train_epochs epoch",
    "train.max_steps": "max_steps max_train_steps total_steps num_steps max_iters num_training_steps train_steps",
    "train.save_every": "save_steps save_strategy checkpointing_steps save_interval saves_per_epoch",
    "train.keep_last": "save_total_limit keep_last_n_checkpoints",
    "train.mixed_precision bf16": "bf16 bfloat16 pure_bf16 bf16_full_eval",
    "train.mixed_precision fp16": "fp16 half float16",
    "train.layout packed": "packing sample_packing padding_free use_packing neat_packing",
    "train.group_by_length": "group_by_length",
    "train.compile": "torch_compile compile",
    "train.deterministic": "full_determinism",
    "train.tokens_per_batch": "max_tokens_per_batch",
    # evaluation
    "eval.every": "eval_steps eval_strategy evaluation_strategy eval_every evals_per_epoch val_check_interval "
    "eval_freq logging_eval_steps",
    "eval.at_start": "eval_on_start do_first_eval",
    "eval.batch": "per_device_eval_batch_size eval_batch_size micro_eval_batch_size",
    "eval.max_pairs": "max_eval_samples n_eval_examples max_eval_batches",
    "eval.select": "load_best_model_at_end metric_for_best_model greater_is_better",
    "eval.patience": "early_stopping_patience patience",
    "eval.generate": "generate_during_eval sample_during_eval predict_with_generate",
    # method
    "method": "rl algorithm trainer trainer_type method_type stage loss",
    "method.variant": "loss_type pref_loss dpo_loss_type preference_loss dpo_loss rl_loss",
    "method.beta": "beta dpo_beta pref_beta kl_beta kl_coef rl_beta init_kl_coef",
    "method.label_smoothing": "label_smoothing dpo_label_smoothing label_smoothing_factor cdpo_label_smoothing",
    "method.nll_weight": "rpo_alpha pref_ftx sft_weight nll_loss_coef",
    # rounds
    "generate.n": "num_generations num_samples n_samples num_return_sequences num_completions best_of",
    "generate.max_tokens": "max_new_tokens response_length generate_max_len",
    "generate.temperature": "temperature sampling_temperature",
    "rounds.count": "num_iterations iterations num_rounds n_iterations",
    "judge.path": "reward_model reward_model_path reward_model_name_or_path judge_model reward_funcs",
    "judge.kind": "judge",
    # the rest
    "output": "output_dir save_dir run_name checkpoint_dir out_dir logging_dir local_run_dir",
    "track.to": "report_to with_tracking use_wandb logger",
    "track.project": "wandb_project wandb_project_name project_name",
    "seed": "data_seed random_seed global_seed",
    # other commands
    "prompts": "prompts_file input_file",
    "model": "model_name_or_path model_path",
}
# Old name of a setting -> its new name.
RENAMED: dict[str, str] = {
    "train.train_epochs": "train.epochs",
    "train.file_mb": "train.max_shard_mb",
    "train.join_seconds": "train.rendezvous_timeout",
    "data.template_seconds": "data.template_timeout",
    "template_seconds": "template_timeout",  # of `infer`
    "rows": "examples",  # of `data`
    "response_tokens": "completion_tokens",  # of `plan`
}
_KEYS: dict[str, list[str]] = {}
for _ours, _theirs in _TABLE.items():
    for _name in _theirs.split():
        _KEYS.setdefault(_name, []).append(_ours)

# Names without a setting of ours -> what to do instead.
_INSTEAD: dict[str, str] = {
    **dict.fromkeys(
        ("max_prompt_length", "max_completion_length", "max_target_length", "truncation_mode", "max_prompt_len"),
        "data.max_length is the maximum of prompt and completion together; data.overlong selects what is truncated",
    ),
    **dict.fromkeys(
        ("logging_steps", "logging_strategy", "log_every"),
        "every step is logged in metrics.jsonl",
    ),
    **dict.fromkeys(
        ("resume_from_checkpoint", "resume", "auto_resume_from_checkpoints"),
        "the same command with the same --output resumes the run",
    ),
    **dict.fromkeys(("overwrite_output_dir",), "choose another --output, or delete the folder"),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "deepspeed_config", "ddp_find_unused_parameters", "num_processes"),
        "the launcher selects the parallel backend: accelerate launch --config_file configs/accelerate/zero3.yaml",
    ),
    **dict.fromkeys(
        ("use_liger_kernel", "use_liger", "liger_kernel", "enable_liger_kernel", "use_liger_loss"),
        "the fused output head is always used; --help kernel lists its settings",
    ),
    **dict.fromkeys(
        ("dataset_num_proc", "preprocessing_num_workers", "dataloader_num_workers", "remove_unused_columns"),
        "leave it out: tokenized data is cached on disk",
    ),
    **dict.fromkeys(
        ("tokenizer_name", "tokenizer_name_or_path", "tokenizer_path", "tokenizer"),
        "the tokenizer is loaded from model.path",
    ),
    **dict.fromkeys(
        ("dataset_split", "dataset_train_split", "train_split", "dataset_config", "dataset_config_name", "eval_split"),
        "append the split to the source: --data.train NAME:SPLIT",
    ),
    **dict.fromkeys(("push_to_hub", "hub_model_id"), "upload model/ in the output folder with huggingface-cli"),
    **dict.fromkeys(
        ("max_train_samples", "max_samples", "n_examples"),
        "limit the run with train.max_steps, or use a smaller file",
    ),
}


def is_whole(key: str) -> bool:
    """Whether the table contains a key together with its group."""
    return "." in key and key.lower().replace("-", "_") in _KEYS


def ours(key: str, known: Collection[str]) -> str | None:
    """Our name for an unknown setting, as the end of an error message; None for an unknown name.

    Args: key: as given, with or without a group before it. known: the command's settings.
    """
    whole = key.lower().replace("-", "_")
    for name in dict.fromkeys((whole, whole.rpartition(".")[2])):
        there = [found for found in _KEYS.get(name, ()) if found.partition(" ")[0] in known]
        if there:
            also = ", the pairs per optimizer step over all ranks" if "accum" in name else ""
            return f"; use {there[0]}{also}"
        if name in _INSTEAD and "data.train" in known:
            return f"; {_INSTEAD[name]}"
    return None
