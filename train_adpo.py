"""ADPO: move the policy, measured from an anchor, towards a softmax of the group's rewards.

    u_i = (s_i - a_i) / tau        p = softmax(u)        q = softmax(z(reward) / reward temperature)
    L   = mean over P problems of  -sum_i q_i log p_i    dL/ds_i = (p_i - q_i) / (tau * P)

where s is the log-probability of a completion under the policy, a under its anchor, and z standardises the
rewards of a group. It differs from GRPO in that

    1. the loss is listwise: a group shares out one unit of probability, and no ratio is clipped;
    2. what holds the policy back is what it is measured from: see ANCHOR, and lib/anchors.py.

    python train_adpo.py                                            # the tiny model, on a laptop, in minutes
    python train_adpo.py --anchor ema --updates-per-batch 2         # every constant below is an option
    python train_adpo.py @recipes/adpo_qwen3-1.7b_4090.args         # a real model on a real card
"""

import math
from functools import partial

import torch

from lib.agreement import compare, probe_sampler
from lib.anchors import Anchor, explain_flat_loss, measure_distance
from lib.batches import Steps, drop_long_prompts, load_problems, longest_prompt
from lib.draws import SamplingParams
from lib.engines import choose_engines, load_policy, open_sampler
from lib.evaluation import EVAL_TEMPERATURE, evaluate_problems, save_evaluation, summarise_groups
from lib.grading import Grader
from lib.losses import adpo, anchor_kl, mask_tokens, sequence_logprob
from lib.memory import Workload
from lib.models import load_tokenizer, locate_model
from lib.phases import measure_tempering
from lib.policy import learning_rate_at
from lib.preflight import look_ahead, print_preflight, probe_learning
from lib.prompts import encode_prompt
from lib.report import StepClock, StepLines, average_metrics, measure_groups, print_result
from lib.rewards import grade_groups, parse_rewards, score_groups
from lib.runlog import RunLog
from lib.sampler import keep_advantages
from lib.settings import current_settings, run_script

# --- what is trained, on what, and where it goes
MODEL = "data/tiny-qwen3"  # model or adapter folder, or a hub id
TRAIN_DATA = "data/tiny/train.jsonl"  # problems: .jsonl or .parquet file, or a hub id
VALID_DATA = "data/tiny/valid.jsonl"  # problems that choose checkpoints/best
TEST_DATA = "data/tiny/test.jsonl"  # problems of the table at the end
OUTPUT_DIR = "runs/adpo"  # run folder; started again on the same one, a run continues
PREFLIGHT = False  # only ask whether this run will fit and learn: exit code 0 if so, nothing is written
FRESH = False  # start over in OUTPUT_DIR: deletes what an earlier run wrote there
SEED = 1  # adapter, problem order and every sampled token are functions of it

# --- the algorithm
TAU = 0.8  # > 0, temperature of the anchored log-probabilities [nat]: small is steep
REWARD_TEMPERATURE = 0.5  # > 0, temperature of the target: small puts all on the best
ADAPTIVE_TAU = "off"  # off | original | inverted: lower tau for an undecided target, or for a decided one
ADAPTIVE_TAU_ALPHA = 0.5  # >= 0 and <= 1, how far tau may fall, as a share
ADAPTIVE_TAU_MIN = 0.05  # > 0, where it stops [nat]
SCALE_REWARDS = "group"  # group | batch | none: whose standard deviation divides the rewards
STD_FLOOR = 0.01  # >= 0, a smaller standard deviation counts as this one [reward]
DROP_FAILED = False  # leave out problems in which no completion earned more than 0
LOGPROB_REDUCTION = "sum"  # sum | mean: of a completion's token log-probabilities
ANCHOR = "on_policy"  # on_policy | fixed | ema | kl_triggered: what the policy is measured from
EMA_DECAY = 0.95  # >= 0 and <= 1, share of the ema anchor that stays at an optimizer step
DRIFT_THRESHOLD = 0.1  # > 0, mean drift of ten steps that moves the kl_triggered anchor [nat/token]
ANCHOR_KL_COEF = 0.0  # >= 0, weight of the KL from the anchor per token
UPDATES_PER_BATCH = 1  # >= 1, optimizer steps on each batch of samples; 1 is on-policy
REWARDS = "good_accuracy(ngram_size=4,max_penalty=-0.5,factor=0.1,strict=true):1"  # part:weight
GROUP_SIZE = 20  # >= 2, completions per problem
PROBLEMS_PER_STEP = 5  # >= 1, problems per batch
EPOCHS = 100  # >= 1, passes over all problems
MAX_STEPS: int | None = 100  # >= 1, stop after so many batches; none is all epochs

# --- optimizer
LEARNING_RATE = 8e-4  # > 0, peak [per step]
LR_SCHEDULE = "cosine"  # constant | cosine: down to 0 at the last step
WARMUP = 0.05  # >= 0 and <= 1, share of the steps in which the learning rate rises
OPTIMIZER = "adamw"  # adamw | adamw_8bit: 8-bit moments by bitsandbytes
WEIGHT_DECAY = 0.0  # >= 0
MAX_GRAD_NORM = 1.0  # > 0, the gradient is clipped to this norm
LORA_RANK = 16  # >= 1
LORA_ALPHA = 32.0  # > 0, the adapter is scaled by alpha / rank
LORA_TARGETS = "all-linear"  # names of modules separated by blanks, or all-linear

# --- prompt and sampling
PROMPT = "answer_tag"  # answer_tag | boxed | think_answer: how to ask, and how an answer is written
THINKING: bool | None = None  # Qwen3's thinking flag; none is the template's default
TEMPERATURE = 1.0  # > 0, of the training samples
PHASE = ""  # sampling behind a marker in the completion, as in "</think>: T0.6,p0.95"; empty is one phase
MAX_PROMPT_TOKENS = 512  # >= 1, problems with longer prompts are dropped
MAX_NEW_TOKENS = 64  # >= 1, tokens per completion
EVAL_SAMPLES = 10  # >= 1, answers per problem in evaluations, sampled as evaluate.py does

# --- how it runs
ENGINE = "auto"  # auto | unsloth | peft: what trains; auto is unsloth on a card with it and vLLM
SAMPLER = "auto"  # auto | vllm | transformers: what samples; auto is vllm on a card where it is installed
SAMPLER_MEMORY = 0.5  # > 0 and < 1, share of the card for vLLM: weights and cache
AGREEMENT: float | None = None  # > 0, sampler and policy may differ so much [nat]; none: 1e-4, bf16 0.03
LOAD_IN_4BIT = False  # hold the base in 4 bits, by bitsandbytes
TOKENS_PER_MICROBATCH = 16384  # >= 1, padded tokens in one forward: memory against speed
GRADIENT_CHECKPOINTING = False  # recompute activations in backward: less memory, a third more time
SAVE_EVERY = 10  # >= 1, steps between checkpoints
EVAL_EVERY = 20  # >= 1, steps between evaluations on VALID_DATA
REPORT_TO = "tensorboard"  # tensorboard | wandb | trackio | none


def describe_work(engines, place, prompt_tokens):
    """What this run asks of the machine."""
    lora = {"lora_rank": LORA_RANK, "lora_targets": LORA_TARGETS}
    how = {"optimizer": OPTIMIZER, "gradient_checkpointing": GRADIENT_CHECKPOINTING}
    how |= {"load_in_4bit": LOAD_IN_4BIT, "adapter": place.adapter, "shared_weights": engines.shared}
    how["sampler_memory"] = SAMPLER_MEMORY if engines.sampler == "vllm" else None
    return Workload(TOKENS_PER_MICROBATCH, prompt_tokens + MAX_NEW_TOKENS, GROUP_SIZE, **lora, **how)


def start(engines, place, tokenizer, *, work, max_rows):
    """The policy with its optimizer, and a sampler that has been seen to follow it."""
    policy = load_policy(engines, place, tokenizer, work=work, alpha=LORA_ALPHA, seed=SEED)
    policy.start_optimizer(OPTIMIZER, weight_decay=WEIGHT_DECAY)
    sampler = open_sampler(engines, policy, place, work=work, max_rows=max_rows)
    probe_learning(policy, work, only_on_card=not PREFLIGHT)
    prompt = encode_prompt(tokenizer, "What is 1 + 1?", style=PROMPT, thinking=THINKING)
    probe_sampler(policy, sampler, prompt, tolerance=AGREEMENT)
    return policy, sampler


def rehearse(learner, problems, params, *, ask, grade, score, work):
    """Sample and score a few problems as a step would, say what to change, and end: with 0 if nothing is."""
    prompts = [ask(problem.problem) for problem in problems]
    groups = learner[1].sample(problems, prompts, params, group_size=GROUP_SIZE, seed=SEED, step=1)
    score(grade(groups))
    raise SystemExit(print_preflight(*learner, groups, work=work, style=PROMPT, thinking=THINKING))


def push(groups, scored, anchor_NT):
    """Differentiate the loss of a batch as it stands, down to `scored`; returns its metrics."""
    reward_PG = torch.tensor([group.reward for group in groups], device=anchor_NT.device)
    score = partial(sequence_logprob, length_N=scored.length_N, reduction=LOGPROB_REDUCTION)
    s_PG, anchor_PG = (score(logp_NT).view_as(reward_PG) for logp_NT in (scored.logp_NT, anchor_NT))
    s_PG.retain_grad()
    measured = measure_distance(scored, anchor_NT, LOGPROB_REDUCTION)
    how = {"adaptive_tau": ADAPTIVE_TAU, "adaptive_tau_alpha": ADAPTIVE_TAU_ALPHA, "std_floor": STD_FLOOR}
    how |= {"adaptive_tau_min": ADAPTIVE_TAU_MIN, "scale_rewards": SCALE_REWARDS, "drop_failed": DROP_FAILED}
    loss = s_PG.sum() * math.nan  # makes the optimizer skip this update, unless there is a better one
    if (s_PG - anchor_PG).isfinite().all():
        loss, info = adpo(s_PG, anchor_PG, reward_PG, tau=TAU, reward_temperature=REWARD_TEMPERATURE, **how)
        kept_N1 = ~info["dropped_P"].repeat_interleave(reward_PG.shape[1])[:, None]
        mask_NT = mask_tokens(scored.length_N, anchor_NT.shape[1]) & kept_N1
        measured |= {"mean_tau": info["tau_P"].mean(), "target_entropy": info["entropy_P"].mean()}
        measured |= {"dropped_prompts": info["dropped_P"].sum(), "kl_penalty": 0.0}
        if ANCHOR_KL_COEF > 0:
            penalty = ANCHOR_KL_COEF * anchor_kl(scored.logp_NT, anchor_NT, mask_NT)
            loss, measured["kl_penalty"] = loss + penalty, penalty.detach()
    loss.backward()
    keep_advantages(groups, -s_PG.grad)
    return {"loss": loss.item()} | {f"adpo/{name}": float(value) for name, value in measured.items()}


def main():
    # Everything a run needs is read and checked before the model is loaded, cheap failures first.
    engines = choose_engines(ENGINE, SAMPLER, phase=PHASE, load_in_4bit=LOAD_IN_4BIT)
    grader = Grader()
    grade = partial(grade_groups, style=PROMPT, grader=grader)
    score = partial(score_groups, parse_rewards(REWARDS, style=PROMPT, grader=grader))
    drawn = {"max_new_tokens": MAX_NEW_TOKENS, "phase": PHASE}
    params, eval_params = (SamplingParams(temperature=t, **drawn) for t in (TEMPERATURE, EVAL_TEMPERATURE))
    place = locate_model(MODEL)
    train, valid, test = (load_problems(path, grader=grader) for path in (TRAIN_DATA, VALID_DATA, TEST_DATA))
    tokenizer = load_tokenizer(place)
    ask = partial(encode_prompt, tokenizer, style=PROMPT, thinking=THINKING)
    train = drop_long_prompts(train, ask, limit=MAX_PROMPT_TOKENS)
    batches = Steps(train, {None: PROBLEMS_PER_STEP}, seed=SEED)
    total = min(MAX_STEPS or math.inf, EPOCHS * batches.epoch_steps)
    work = describe_work(engines, place, max(MAX_PROMPT_TOKENS, longest_prompt(valid + test, ask)))
    ledger = look_ahead(place, work, full=PREFLIGHT, engines=engines.packages)
    logged = {"fresh": FRESH, "report_to": REPORT_TO, "inputs": (TRAIN_DATA, VALID_DATA, TEST_DATA, MODEL)}
    run = None if PREFLIGHT else RunLog(OUTPUT_DIR, "train_adpo.py", current_settings(main), **logged)
    if run and run.finished:
        return print_result(run.folder)
    policy, sampler = start(engines, place, tokenizer, work=work, max_rows=ledger.sampled_rows)
    if PREFLIGHT:
        return rehearse((policy, sampler), train[:2], params, ask=ask, grade=grade, score=score, work=work)
    anchor = Anchor(policy, ANCHOR, from_adapter=place.adapter, decay=EMA_DECAY, threshold=DRIFT_THRESHOLD)
    run.restore(policy, anchor=anchor)
    schedule = {"peak": LEARNING_RATE, "schedule": LR_SCHEDULE, "warmup": WARMUP}
    sampling = {"prompt": PROMPT, "thinking": THINKING} | vars(eval_params)
    how = {"ask": ask, "samples": EVAL_SAMPLES, "params": eval_params, "grade": grade, "seed": SEED}
    evaluate = partial(evaluate_problems, sampler, **how)
    if run.start == 0:
        print(explain_flat_loss(GROUP_SIZE))
        save_evaluation(run.folder / "evaluation" / "before", evaluate(test), style=PROMPT)
    with StepLines(total, done=run.start) as lines, run:
        for step in range(run.start + 1, total + 1):
            clock = StepClock()

            # 1. Pick the problems of this step: a function of the seed and the step alone.
            problems = batches[step - 1]

            # 2. Sample a group of completions for each.
            prompts = [ask(problem.problem) for problem in problems]
            groups = sampler.sample(problems, prompts, params, group_size=GROUP_SIZE, seed=SEED, step=step)
            clock.lap("sample")

            # 3. Score every completion.
            score(grade(groups))
            clock.lap("score")

            updates = []
            for update in range((step - 1) * UPDATES_PER_BATCH, step * UPDATES_PER_BATCH):
                # 4. Turn rewards into a push: from the anchor, towards the softmax of the rewards.
                alike = ANCHOR == "on_policy" and UPDATES_PER_BATCH == 1  # measured from itself
                scored = policy.logprobs(groups, later=alike)
                measured = push(groups, scored, anchor.logprobs(groups, scored))
                # 5. Back-propagate the push through the model, take an optimizer step, and move the anchor.
                policy.backward(scored)
                measured |= {} if updates else compare(groups, scored, tolerance=AGREEMENT)
                rate = learning_rate_at(update, total * UPDATES_PER_BATCH, **schedule)
                grad_norm = policy.step(rate, max_grad_norm=MAX_GRAD_NORM)
                anchor.follow(measured["adpo/token_drift"], stepped=math.isfinite(grad_norm))
                updates.append(measured | {"grad_norm": grad_norm, "learning_rate": rate})
            clock.lap("learn")

            # 6. Log and save.
            metrics = average_metrics(updates) | {"adpo/anchor_updates": anchor.updates}
            metrics |= measure_groups(groups) | measure_tempering(groups, [params], sampler.text_of)
            if evaluating := step % EVAL_EVERY == 0 or step == total:
                metrics |= run.keep_best(step, summarise_groups(evaluate(valid)))
            metrics |= clock.metrics() | policy.memory_metrics()
            run.log_step(step, metrics, groups)
            lines.show(step, metrics, groups)
            if evaluating or step % SAVE_EVERY == 0 or run.interrupted:
                run.save(step, policy, sampling=sampling, anchor=anchor)

    run.load_best(policy)
    save_evaluation(run.folder / "evaluation" / "after", evaluate(test), style=PROMPT)
    run.finish()
    print_result(run.folder)


if __name__ == "__main__":
    run_script(main)
