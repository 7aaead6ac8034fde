#!/bin/sh
# Every line in benchmarks/results/, in about four and a half hours on two idle cores. Give names to run a part: speed accepted ...
set -eu
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
PATH="$BIN:$PATH"
RESULTS=benchmarks/results
auto=token-recycling:tree=auto:warm_up_from_prompt=true

keep() { # the lines of a run become one results file
  cat "runs/$1/results.jsonl" >>"$RESULTS/$1.jsonl"
}

keep_means() { # the same without the single items, where there are thousands
  python -c 'import json, sys
for line in sys.stdin: print(json.dumps({k: v for k, v in json.loads(line).items() if k != "items"}))' \
    <"runs/$1/results.jsonl" >>"$RESULTS/$1.jsonl"
}

for part in ${*:-profile speed accepted spectr exactness toy constrain peer bytes complete ensemble tokenize transplant guard stochastok lm vocabulary supertokens guard-speed shorten words large vqa prune-speed hisa-speed needle-tokens long-context attention-mass attend-speed kvpress recall-beyond hisa-recall token-sparsity diffuse guided frozen composed diffusion-speed}; do
  case $part in
  profile) python benchmarks/forward_cost.py ;;
  speed)
    tokenmill bench generate --limit 12 --warm 8 --out runs/speed \
      --methods plain,stock,prompt-lookup,$auto,$auto:draft=hybrid,token-recycling:tree=15:warm_up_from_prompt=true
    keep speed
    ;;
  accepted)
    tokenmill bench generate --data python-stdlib --limit 16 --warm 16 --out runs/accepted \
      --methods plain,token-recycling,token-recycling:warm_up_from_prompt=true,token-recycling:tree=15
    tokenmill bench generate --data python-stdlib --limit 16 --warm 0 --out runs/accepted \
      --methods plain,token-recycling
    keep accepted
    ;;
  spectr)
    for length in 4 8; do
      methods=plain
      for drafts in 1 2 4 8; do methods=$methods,spectr:num_drafts=$drafts:draft_len=$length; done
      tokenmill bench generate --model python-target --draft python-draft --sample --dtype float32 \
        --data python-stdlib --limit 24 --prompt-tokens 128 --methods $methods --out runs/spectr
    done
    keep spectr
    ;;
  exactness)
    python benchmarks/exactness.py
    python benchmarks/exactness.py --dtype bfloat16
    ;;
  toy) python benchmarks/awrs_toy.py ;;
  constrain)
    tokenmill bench constrain --limit 3 --mask-tokens 1 --methods plain,mask,llguidance,lcd,rerank,awrs --out runs/constrain ||
      echo "constrain: llguidance has no masks for three of the kinds; their lines say so" >&2
    keep constrain
    ;;
  peer) python benchmarks/peers/compare_awrs.py ;; # `make peers` first
  bytes)
    tokenmill bench bytes --limit 1000 --cut mid-token --methods plain,healing,byte-level-probabilities --out runs/bytes
    tokenmill bench bytes --limit 100 --cut boundary --methods plain,healing,byte-level-probabilities --out runs/bytes
    tokenmill bench bytes --limit 30 --cut closed --dtype float32 --methods plain,healing,byte-level-probabilities --out runs/bytes
    keep bytes
    ;;
  complete)
    tokenmill bench bytes --measure complete --limit 200 \
      --methods plain,healing,transformers-healing,byte-level-probabilities --out runs/complete
    keep complete
    ;;
  ensemble)
    tokenmill bench bytes --other python-target --limit 60 --cut mid-token \
      --methods byte-level-probabilities,other,ensemble,ensemble:rule=product --out runs/ensemble
    keep ensemble
    ;;
  tokenize)
    tokenmill bench tokenize --vocab-size 4096 --train-chars 0 --limit 200 --out runs/tokenize \
      --data python-stdlib,python-reference,manual-pages:english+german \
      --methods plain,kl3m-tokenizers,kl3m-tokenizers:custom_tokens=empty,vocabulary:path=gpt2,vocabulary:path=bpe_openai/cl100k_base,vocabulary:path=bpe_openai/o200k_base,vocabulary:path=gemma-3-270m
    keep tokenize
    ;;
  transplant)
    tokenmill bench transplant --targets domain,super,gpt2 --limit 8 --out runs/transplant \
      --data python-stdlib,python-reference,manual-pages:german \
      --methods random,mean,piece-mean,focus,tokenadapt:global_weight=0.0,tokenadapt
    keep transplant
    for seed in 0 1 2; do
      tokenmill bench transplant --dtype float32 --train-steps 100 --train-rate 2e-4 --seed $seed --limit 8 --out runs/transplant-steps \
        --methods random,piece-mean,tokenadapt
    done
    keep transplant-steps
    ;;
  guard)
    tokenmill bench guard --methods entropy,tokens-per-word,cpt-filtering,cpt-filtering:threshold=3.1 --out runs/guard
    keep guard
    tokenmill bench guard --chars 300 --tokens 20 --limit 300 --methods cpt-filtering,cpt-filtering:threshold=3.1 --out runs/guard-tokens
    keep_means guard-tokens
    tokenmill bench guard --data python-reference,manual-pages --limit 300 --encodings reverse \
      --methods cpt-filtering --out runs/guard-languages
    keep guard-languages
    ;;
  stochastok) python benchmarks/stochastok_speed.py ;;
  lm)
    tokenmill bench lm --data python-reference --steps 1500 --limit 3 --methods stochastok:p=0.1 --out runs/lm
    keep lm
    ;;
  supertokens) python benchmarks/supertokens.py ;;
  guard-speed) python benchmarks/guard_speed.py ;;
  vocabulary) python benchmarks/vocabulary_training.py ;;
  shorten)
    level=:boundary=word:target_reduction=0.45
    tokenmill bench shorten --data python-reference,python-stdlib --limit 2 --repeats 1 --out runs/shorten \
      --methods truncate$level,last-piece$level,mean$level,dynamic-tokenization$level
    keep shorten
    ;;
  words)
    pooled=learn-your-tokens:enc_layers=1:dec_layers=1
    tokenmill bench words --limit 1 --methods byte,char,$pooled:num_prefix=1,$pooled:num_prefix=2 --out runs/words
    keep words
    ;;
  large)
    python benchmarks/large_vocabulary.py
    python benchmarks/large_vocabulary.py --search ivf
    ;;
  vqa)
    for model in digits-llava digits-qwen2.5-vl; do
      for keep in 0.25 0.5 0.125; do
        methods=norm:keep=$keep,norm-diverse:keep=$keep,attention:keep=$keep
        seeds="0 1 2 3" tokens=1
        if [ $keep = 0.25 ]; then seeds="0 1 2 3 4 5 6 7 8 9" tokens=2; fi
        for seed in $seeds; do methods=$methods,random:keep=$keep:seed=$seed; done
        for method in divprune idpruner zoo-prune entropyprune entropyprune:layer=1 information-horizon todre vflowopt; do
          methods=$methods,$method:keep=$keep
        done
        methods=$methods,token-correlation-compression:max_tokens=$(python -c "print(int(64 * $keep))")
        OMP_NUM_THREADS=1 tokenmill bench vqa --model $model --limit 250 --new-tokens $tokens --methods $methods --out runs/vqa
      done
    done
    for tokens in 32 16 8; do
      keep=$(python -c "print($tokens / 64)")
      OMP_NUM_THREADS=1 tokenmill bench vqa --model pages-llava --limit 250 --new-tokens 1 --out runs/vqa \
        --methods random:keep=$keep,norm:keep=$keep,norm-diverse:keep=$keep,attention:keep=$keep,divprune:keep=$keep,zoo-prune:keep=$keep,todre:keep=$keep,vflowopt:keep=$keep,token-correlation-compression:max_tokens=$tokens
    done
    OMP_NUM_THREADS=1 tokenmill bench vqa --model pages-llava --limit 250 --new-tokens 1 --out runs/vqa --methods token-correlation-compression
    keep_means vqa
    ;;
  prune-speed) python benchmarks/prune_speed.py ;;
  hisa-speed) python benchmarks/hisa_speed.py ;;
  kvpress) python benchmarks/peers/compare_kvpress.py ;; # `make peers` first
  attention-mass) python benchmarks/attention_mass.py ;;
  attend-speed) python benchmarks/attend_speed.py ;;
  needle-tokens) python benchmarks/needle_tokens.py ;;
  long-context)
    select=tokenselect:keep=128:n_init=16:n_local=112:chunk=64
    tokenmill bench long-context --length 1024 --limit 4 --out runs/long-context \
      --methods oracle:keep=256,streaming:keep=256,snapkv:keep=256,quest:keep=256,fasa:keep=256,$select,$select:positions=original,token-sparse-attention
    keep_means long-context
    ;;
  diffuse) # settings are chosen on the validation split, where one seed is enough
    rules=quota:n=2,quota:n=4
    for tau in 0.5 0.7 0.8 0.9 0.95 0.99; do rules=$rules,threshold:tau=$tau; done
    for f in 0.1 0.25 0.5 1.0; do rules=$rules,factor:f=$f; done
    for gamma in 0.01 0.05 0.1 0.3; do rules=$rules,entropy-bound:gamma=$gamma; done
    filters=
    for tau in 0.5 0.7 0.8 0.9 0.95 0.97; do
      filters=$filters,learn2pd:threshold=$tau
      for least in 0.0 0.9 0.99; do
        filters=$filters,learn2pd:threshold=$tau:predict_eot=true:eot_min_confidence=$least
      done
    done
    policies=,unmasking-policies:temperature=0.0,unmasking-policies:temperature=0.5,unmasking-policies:temperature=1.0
    diffuse() { tokenmill bench diffuse "$@" --out runs/diffuse; }
    diffuse --model diffusion-long --split validation --limit 100 --methods $rules$filters
    diffuse --model diffusion-mixed --block 0 --split validation --limit 100 --methods $rules$policies
    for seed in 0 1 2; do
      diffuse --model diffusion-long --limit 250 --seed $seed --methods $(python benchmarks/diffuse_chosen.py diffusion-long)
      diffuse --model diffusion-mixed --block 0 --limit 167 --rows 167 --seed $seed \
        --methods $(python benchmarks/diffuse_chosen.py diffusion-mixed --block 0)
    done
    keep_means diffuse
    ;;
  guided) # the kind of exercise with several right answers; `diffuse` has chosen the thresholds
    guided() { tokenmill bench diffuse --model diffusion-mixed --block 0 --kinds permutation "$@" --out runs/guided; }
    rules=threshold:tau=0.5
    for tau in 0.6 0.7 0.8 0.9 0.95 0.99; do rules=$rules,threshold:tau=$tau; done
    judge=freecache-guided-diffusion
    guided --split validation --limit 500 --rows 125 --methods $rules
    for seed in 0 1 2; do
      guided --limit 500 --rows 125 --seed $seed --methods $rules,quota:n=1:block=1
      for guide in small weak medium; do
        guided --limit 500 --rows 125 --seed $seed --guide diffusion-mixed-guide-$guide \
          --methods $judge,$judge:acceptance=topk_relative,$judge:acceptance=threshold
      done
    done
    keep_means guided
    ;;
  frozen) # one token a pass: what windows and frozen prefixes feed, and what they cost in accuracy
    window=window-diffusion:external_window=32:internal_window=16:refresh_cycle=16
    few=window-diffusion:external_window=24:internal_window=8:refresh_cycle=16
    for seed in 0 1 2; do
      tokenmill bench diffuse --model diffusion-long --limit 250 --seed $seed --out runs/frozen \
        --methods plain:cache=free,plain:cache=sliding,plain:cache=prefix,plain:cache=dual,$window,$few
    done
    keep_means frozen
    ;;
  composed) # rules and caches together, against the plain sampler; timed, so on an idle machine
    for rows in 1 25; do
      tokenmill bench diffuse --model diffusion-long --limit 50 --rows $rows --repeats 3 --out runs/composed \
        --methods $(python benchmarks/diffuse_chosen.py diffusion-long --compose none,prefix,dual,free)
    done
    keep_means composed
    ;;
  diffusion-speed) python benchmarks/diffusion_speed.py ;;
  recall-beyond) python benchmarks/recall_beyond.py ;;
  hisa-recall) python benchmarks/hisa_recall.py --count 250 --sizes 16 8 4 ;;
  token-sparsity) python benchmarks/token_sparsity.py --texts 3 ;;
  *)
    echo "unknown part $part: profile, speed, accepted, spectr, exactness, toy, constrain, peer, bytes, complete, ensemble, tokenize, transplant, guard, stochastok, lm, vocabulary, supertokens, guard-speed, shorten, words, large, vqa, prune-speed, hisa-speed, needle-tokens, long-context, attention-mass, attend-speed, kvpress, recall-beyond, hisa-recall, token-sparsity, diffuse, guided, frozen, composed, diffusion-speed" >&2
    exit 2
    ;;
  esac
done
