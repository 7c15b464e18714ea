"""adaGRPO: GRPO that samples a problem again, more boldly each time, until its group is good enough.

    A_i = (r_i - mean r) / (std r + 1e-4)        mean and std over the rewards of ALL attempts at the problem
    l_t = -min(ratio_t * A, clip(ratio_t, 1 - eps, 1 + eps) * A) + KL_COEF * KL_t(policy || base)

where ratio_t is how much likelier a token has become since it was sampled. It differs from GRPO in that

    1. problems whose group is not good enough (no right answer) are sampled again at once, by the next row of
       a schedule; the next step begins with the first row again;
    2. the last group is trained on, measured against all attempts: success at the third weighs more.

    python train_adagrpo.py                                          # the tiny model, on a laptop, in minutes
    python train_adagrpo.py --max-resamples 0                        # GRPO; every constant below is an option
    python train_adagrpo.py @recipes/adagrpo_qwen3-1.7b_5060ti.args  # a real model on a real card
"""

from functools import partial
from math import inf

import torch

from lib.agreement import compare, probe_sampler
from lib.anchors import Anchor
from lib.batches import Steps, drop_long_prompts, load_problems, longest_prompt
from lib.draws import SamplingParams
from lib.engines import choose_engines, load_policy, open_sampler
from lib.evaluation import EVAL_TEMPERATURE, evaluate_problems, save_evaluation, summarise_groups
from lib.grading import Grader
from lib.losses import clipped_policy_gradient, group_advantages, mask_tokens
from lib.memory import Workload
from lib.models import load_tokenizer, locate_model
from lib.phases import measure_tempering
from lib.policy import learning_rate_at
from lib.preflight import look_ahead, print_preflight, probe_learning
from lib.prompts import encode_prompt
from lib.report import StepClock, StepLines, average_metrics, measure_groups, print_result
from lib.resampling import measure_resampling, parse_condition, parse_schedule, rows_at, sort_attempts
from lib.rewards import grade_groups, parse_rewards, score_groups
from lib.runlog import RunLog
from lib.settings import current_settings, run_script

# --- what is trained, on what, and where it goes
MODEL = "data/tiny-qwen3"  # model or adapter folder, or a hub id
TRAIN_DATA = "data/tiny/train.jsonl"  # problems: .jsonl or .parquet file, or a hub id
VALID_DATA = "data/tiny/valid.jsonl"  # problems that choose checkpoints/best
TEST_DATA = "data/tiny/test.jsonl"  # problems of the table at the end
OUTPUT_DIR = "runs/adagrpo"  # run folder; started again on the same one, a run continues
PREFLIGHT = False  # only ask whether this run will fit and learn: exit code 0 if so, nothing is written
FRESH = False  # start over in OUTPUT_DIR: deletes what an earlier run wrote there
SEED = 1  # adapter, problem order and every sampled token are functions of it

# --- the algorithm
GOOD_ENOUGH = "correct >= 1"  # a group that needs no other attempt: correct >= N, or reward > X (its best)
SCHEDULE = "1: 2xT1.0; 30: 2xT1.0 2xT1.1,p0.99"  # from step: further attempts, like T1.1,p0.99,k20,m0.05,r1.2
MAX_RESAMPLES: int | None = None  # >= 0, at most so many of them; 0 is GRPO, none is the whole schedule
TRAIN_ON = "last"  # last | all: groups of a problem that was sampled several times
SCALE_REWARDS = "group"  # group | none: divide by the standard deviation of all attempts, or do not
CLIP_EPS = 0.2  # > 0 and < 1, how far the ratio of a token may fall
CLIP_EPS_HIGH: float | None = None  # > 0, how far it may rise; none is as far as it may fall
KL_COEF = 0.04  # >= 0, weight of the KL from the base; 0 saves a forward pass
NORMALISER = "dapo"  # grpo | dapo | dr_grpo: mean by completion, over all tokens, or by MAX_NEW_TOKENS
UPDATES_PER_BATCH = 1  # >= 1, optimizer steps on each batch of samples; from 2 on the clipping acts
REWARDS = "correctness:1 answer_tag:1/3 tail_position:1/3 length_decay(start=48,end=64):1/3"  # part:weight
GROUP_SIZE = 8  # >= 2, completions per problem and attempt
PROBLEMS_PER_STEP = 10  # >= 1, problems per batch
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
TEMPERATURE = 1.0  # > 0, of the first attempt
REPETITION_PENALTY = 1.0  # > 0, of all attempts, where the schedule says no other; 1 is off
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


def weigh(groups):
    """The groups to learn from, and on every group its advantages; they are 0 where nothing is learned."""
    for tries in sort_attempts(groups):
        seen = torch.tensor([reward for group in tries for reward in group.reward])
        for group in tries:
            weight = TRAIN_ON == "all" or group is tries[-1]
            reward_G = torch.tensor(group.reward)
            advantage_G = group_advantages(reward_G, seen=seen, scale=SCALE_REWARDS == "group")
            group.advantage = (advantage_G * weight).tolist()
    return groups if TRAIN_ON == "all" else [tries[-1] for tries in sort_attempts(groups)]


def push(groups, scored, old_NT, *, base):
    """Differentiate the loss of a batch as it stands, down to `scored`; returns its metrics."""
    reference_NT = base.logprobs(groups, scored) if KL_COEF else None
    advantage_N = torch.tensor([a for group in groups for a in group.advantage], device=old_NT.device)
    mask_NT = mask_tokens(scored.length_N, old_NT.shape[1])
    how = {"clip_eps": CLIP_EPS, "clip_eps_high": CLIP_EPS_HIGH, "kl_coef": KL_COEF}
    how |= {"ref_logp_GT": reference_NT, "normaliser": NORMALISER, "max_tokens": MAX_NEW_TOKENS}
    loss, info = clipped_policy_gradient(scored.logp_NT, old_NT, advantage_N, mask_NT, **how)
    loss.backward()
    return {"loss": loss.item()} | {name: float(value) for name, value in info.items()}


def main():
    # Everything a run needs is read and checked before the model is loaded, cheap failures first.
    engines = choose_engines(ENGINE, SAMPLER, phase=PHASE, load_in_4bit=LOAD_IN_4BIT)
    grader = Grader()
    grade = partial(grade_groups, style=PROMPT, grader=grader)
    score = partial(score_groups, parse_rewards(REWARDS, style=PROMPT, grader=grader))
    drawn = {"repetition_penalty": REPETITION_PENALTY, "max_new_tokens": MAX_NEW_TOKENS, "phase": PHASE}
    first, eval_params = (SamplingParams(temperature=t, **drawn) for t in (TEMPERATURE, EVAL_TEMPERATURE))
    schedule = parse_schedule(SCHEDULE, base=first, limit=MAX_RESAMPLES)
    is_solved = parse_condition(GOOD_ENOUGH, group_size=GROUP_SIZE)
    place = locate_model(MODEL)
    train, valid, test = (load_problems(path, grader=grader) for path in (TRAIN_DATA, VALID_DATA, TEST_DATA))
    tokenizer = load_tokenizer(place)
    ask = partial(encode_prompt, tokenizer, style=PROMPT, thinking=THINKING)
    train = drop_long_prompts(train, ask, limit=MAX_PROMPT_TOKENS)
    batches = Steps(train, {None: PROBLEMS_PER_STEP}, seed=SEED)
    total = min(MAX_STEPS or inf, EPOCHS * batches.epoch_steps)
    work = describe_work(engines, place, max(MAX_PROMPT_TOKENS, longest_prompt(valid + test, ask)))
    ledger = look_ahead(place, work, full=PREFLIGHT, engines=engines.packages)
    logged = {"fresh": FRESH, "report_to": REPORT_TO, "inputs": (TRAIN_DATA, VALID_DATA, TEST_DATA, MODEL)}
    run = None if PREFLIGHT else RunLog(OUTPUT_DIR, "train_adagrpo.py", current_settings(main), **logged)
    if run and run.finished:
        return print_result(run.folder)
    policy, sampler = start(engines, place, tokenizer, work=work, max_rows=ledger.sampled_rows)
    if PREFLIGHT:
        return rehearse((policy, sampler), train[:2], first, ask=ask, grade=grade, score=score, work=work)
    old, base = Anchor(policy, "on_policy"), Anchor(policy, "fixed")
    run.restore(policy)
    course = {"peak": LEARNING_RATE, "schedule": LR_SCHEDULE, "warmup": WARMUP}
    sample = partial(sampler.sample, group_size=GROUP_SIZE, seed=SEED)
    how = {"ask": ask, "samples": EVAL_SAMPLES, "params": eval_params, "grade": grade, "seed": SEED}
    evaluate = partial(evaluate_problems, sampler, **how)
    if run.start == 0:
        save_evaluation(run.folder / "evaluation" / "before", evaluate(test), style=PROMPT)
    with StepLines(total, done=run.start) as lines, run:
        for step in range(run.start + 1, total + 1):
            clock = StepClock()

            # 1. Pick the problems of this step: a function of the seed and the step alone.
            waiting, sampled, rows = batches[step - 1], [], [first, *rows_at(schedule, step)]

            # 2. Sample a group for each; where it is not good enough, again by the next, bolder row.
            for attempt, params in enumerate(rows):
                prompts = [ask(problem.problem) for problem in waiting]
                groups = sample(waiting, prompts, params, step=step, attempt=attempt)
                clock.lap("sample")
                # 3. Score every completion, and see which problems need another attempt.
                score(grade(groups))
                waiting = [group.problem for group in groups if not is_solved(group)]
                sampled += groups
                clock.lap("score")
                if not waiting:
                    break

            groups, updates = weigh(sampled), []
            for update in range((step - 1) * UPDATES_PER_BATCH, step * UPDATES_PER_BATCH):
                # 4. Turn rewards into a push: a problem's last group, measured against all its attempts.
                scored = policy.logprobs(groups)
                measured = push(groups, scored, old.logprobs(groups, scored), base=base)
                measured |= {} if updates else compare(groups, scored, tolerance=AGREEMENT)
                # 5. Back-propagate the push through the model, and take an optimizer step.
                policy.backward(scored)
                rate = learning_rate_at(update, total * UPDATES_PER_BATCH, **course)
                grad_norm = policy.step(rate, max_grad_norm=MAX_GRAD_NORM)
                updates.append(measured | {"grad_norm": grad_norm, "learning_rate": rate})
            clock.lap("learn")

            # 6. Log and save.
            metrics = average_metrics(updates) | measure_groups(groups)
            metrics |= measure_tempering(groups, rows, sampler.text_of)
            metrics |= measure_resampling(sampled, groups, is_solved)
            if evaluating := step % EVAL_EVERY == 0 or step == total:
                metrics |= run.keep_best(step, summarise_groups(evaluate(valid)))
            metrics |= clock.metrics() | policy.memory_metrics()
            run.log_step(step, metrics, sampled)
            lines.show(step, metrics, groups)
            if evaluating or step % SAVE_EVERY == 0 or run.interrupted:
                run.save(step, policy, sampling={"prompt": PROMPT, "thinking": THINKING} | vars(eval_params))

    run.load_best(policy)
    save_evaluation(run.folder / "evaluation" / "after", evaluate(test), style=PROMPT)
    run.finish()
    print_result(run.folder)


if __name__ == "__main__":
    run_script(main)
