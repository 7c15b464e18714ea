"""GRDPO: rank a sampled group by reward, and learn from every better/worse pair.

    L = mean over better/worse pairs (w, l) of a group of  -log sigmoid( beta * (s_w - s_l) )

where s is the (mean token) log-probability of a completion under the model being trained. It differs from DPO
and GRPO in that

    1. there is no reference model, no value model and no KL: only the policy is in memory;
    2. the pairs come from the policy's own samples, ranked by verifiable rewards: the upper half of a group
       against the lower half, wherever the rewards differ;
    3. only the order of the rewards matters, not their size.

    python train_grdpo.py                                           # the tiny model, on a laptop, in minutes
    python train_grdpo.py --beta 0.5 --output-dir runs/softer       # every constant below is an option
    python train_grdpo.py @recipes/grdpo_qwen2.5-1.5b_4090.args     # a real model on a real card
"""

from functools import partial
from math import inf, nan

import torch

from lib.agreement import compare, probe_sampler
from lib.batches import Steps, drop_long_prompts, load_problems, longest_prompt
from lib.draws import SamplingParams
from lib.engines import choose_engines, load_policy, open_sampler
from lib.evaluation import EVAL_TEMPERATURE, evaluate_problems, save_evaluation, summarise_groups
from lib.grading import Grader
from lib.losses import count_silent_groups, grdpo, sequence_logprob
from lib.memory import Workload
from lib.models import load_tokenizer, locate_model
from lib.phases import measure_tempering
from lib.policy import learning_rate_at
from lib.preflight import look_ahead, print_preflight, probe_learning
from lib.prompts import encode_prompt
from lib.report import StepClock, StepLines, measure_groups, print_result
from lib.rewards import grade_groups, parse_rewards, score_groups
from lib.runlog import RunLog
from lib.sampler import keep_advantages
from lib.settings import current_settings, run_script

# --- what is trained, on what, and where it goes
MODEL = "data/tiny-qwen3"  # model or adapter folder, or a hub id
TRAIN_DATA = "data/tiny/train.jsonl"  # problems: .jsonl or .parquet file, or a hub id
VALID_DATA = "data/tiny/valid.jsonl"  # problems that choose checkpoints/best
TEST_DATA = "data/tiny/test.jsonl"  # problems of the table at the end
OUTPUT_DIR = "runs/grdpo"  # run folder; started again on the same one, a run continues
PREFLIGHT = False  # only ask whether this run will fit and learn: exit code 0 if so, nothing is written
FRESH = False  # start over in OUTPUT_DIR: deletes what an earlier run wrote there
SEED = 1  # adapter, problem order and every sampled token are functions of it

# --- the algorithm
BETA = 0.5  # > 0, slope of the logistic [1/nat]
PAIRS = "halves"  # halves | ordered: upper half against lower half, or every better/worse pair
LOGPROB_REDUCTION = "mean"  # mean | sum: of a completion's token log-probabilities
MIN_BETTER_REWARD: float | None = None  # the better one of a pair must earn this much; none is no minimum
REWARDS = "correctness:1 answer_tag:1/3 tail_position:1/3 length_decay(start=48,end=64):1/3"  # part:weight
GROUP_SIZE = 20  # >= 2, completions per problem
EASY = 2  # >= 0, problems of tier easy per step
MEDIUM = 2  # >= 0, problems of tier medium per step
HARD = 1  # >= 0, problems of tier hard per step
PROBLEMS_PER_STEP = 5  # >= 1, problems per step where the data has no tiers
EPOCHS = 100  # >= 1, passes over the medium tier, or over all problems where there are no tiers
MAX_STEPS: int | None = 100  # >= 1, stop after so many steps; none is all epochs

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
MODULES_TO_SAVE = ""  # names of modules that are trained whole, separated by blanks

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
    lora = {"lora_rank": LORA_RANK, "lora_targets": LORA_TARGETS, "modules_to_save": MODULES_TO_SAVE}
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
    counts = {"easy": EASY, "medium": MEDIUM, "hard": HARD} if train[0].tier else {None: PROBLEMS_PER_STEP}
    batches = Steps(train, counts, seed=SEED)
    total = min(MAX_STEPS or inf, EPOCHS * batches.epoch_steps)
    work = describe_work(engines, place, max(MAX_PROMPT_TOKENS, longest_prompt(valid + test, ask)))
    ledger = look_ahead(place, work, full=PREFLIGHT, engines=engines.packages)
    logged = {"fresh": FRESH, "report_to": REPORT_TO, "inputs": (TRAIN_DATA, VALID_DATA, TEST_DATA, MODEL)}
    run = None if PREFLIGHT else RunLog(OUTPUT_DIR, "train_grdpo.py", current_settings(main), **logged)
    if run and run.finished:
        return print_result(run.folder)
    policy, sampler = start(engines, place, tokenizer, work=work, max_rows=ledger.sampled_rows)
    if PREFLIGHT:
        return rehearse((policy, sampler), train[:2], params, ask=ask, grade=grade, score=score, work=work)
    run.restore(policy)
    sampling = {"prompt": PROMPT, "thinking": THINKING} | vars(eval_params)
    how = {"ask": ask, "samples": EVAL_SAMPLES, "params": eval_params, "grade": grade, "seed": SEED}
    evaluate = partial(evaluate_problems, sampler, **how)
    which = {"pairs": PAIRS, "min_better_reward": MIN_BETTER_REWARD}
    if run.start == 0:
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
            reward_PG = torch.tensor([group.reward for group in groups], device=policy.device)
            clock.lap("score")

            # 4. Turn rewards into a push: how the loss changes with the log-probability of each completion.
            scored = policy.logprobs(groups)
            s_N = sequence_logprob(scored.logp_NT, scored.length_N, reduction=LOGPROB_REDUCTION)
            s_PG = s_N.view_as(reward_PG)
            s_PG.retain_grad()
            loss = grdpo(s_PG, reward_PG, beta=BETA, **which) if s_PG.isfinite().all() else nan * s_PG.sum()
            loss.backward()
            keep_advantages(groups, -s_PG.grad)

            # 5. Back-propagate the push through the model, and take an optimizer step.
            policy.backward(scored)
            rate = learning_rate_at(step - 1, total, peak=LEARNING_RATE, schedule=LR_SCHEDULE, warmup=WARMUP)
            grad_norm = policy.step(rate, max_grad_norm=MAX_GRAD_NORM)
            clock.lap("learn")

            # 6. Log and save.
            metrics = {"loss": loss.item(), "grad_norm": grad_norm, "learning_rate": rate}
            metrics["batch/groups_without_pairs"] = count_silent_groups(reward_PG, **which)
            metrics |= measure_groups(groups) | compare(groups, scored, tolerance=AGREEMENT)
            metrics |= measure_tempering(groups, [params], sampler.text_of)
            if evaluating := step % EVAL_EVERY == 0 or step == total:
                metrics |= run.keep_best(step, summarise_groups(evaluate(valid)))
            metrics |= clock.metrics() | policy.memory_metrics()
            run.log_step(step, metrics, groups)
            lines.show(step, metrics, groups)
            if evaluating or step % SAVE_EVERY == 0 or run.interrupted:
                run.save(step, policy, sampling=sampling)
    run.load_best(policy)
    save_evaluation(run.folder / "evaluation" / "after", evaluate(test), style=PROMPT)
    run.finish()
    print_result(run.folder)


if __name__ == "__main__":
    run_script(main)
