# One command each; `make help` lists them. Everything is installed into .venv; what test-parity
# compares with, into .venv-parity, the compilers of tpu-check and gpu-check into theirs.

# The first of these that runs and is new enough; PYTHON=/path/to/python3 overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
MINOR := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# The exact versions: those of this Python's minor version, else those for 3.12 and newer.
CONSTRAINTS := $(firstword $(wildcard constraints/python$(MINOR).txt constraints/python3.12.txt))

# The build of JAX: what the machine has, unless ACCELERATOR=cpu|cuda|tpu says otherwise.
ACCELERATOR ?= $(shell \
	if nvidia-smi -L >/dev/null 2>&1; then echo cuda; \
	elif ls /dev/accel0 /dev/vfio/0 >/dev/null 2>&1 && [ -n "$$TPU_NAME$$TPU_WORKER_ID$$TPU_ACCELERATOR_TYPE" ]; then echo tpu; \
	else echo cpu; fi)
ACCELERATOR_EXTRA := $(if $(filter cpu,$(ACCELERATOR)),,$(ACCELERATOR))
RUNTIME := .venv/installed-$(MINOR)-$(ACCELERATOR)
WITH_TEXT := .venv/installed-$(MINOR)-$(ACCELERATOR)-text
ONNX := .venv/installed-$(MINOR)-$(ACCELERATOR)-onnx
SERVE := .venv/installed-$(MINOR)-$(ACCELERATOR)-serve
VIDEO := .venv/installed-$(MINOR)-$(ACCELERATOR)-video
DEV := .venv/installed-$(MINOR)-$(ACCELERATOR)-dev
DOCS := .venv/installed-$(MINOR)-$(ACCELERATOR)-docs
PARITY := .venv-parity/installed-$(MINOR)
TPU := .venv-tpu/installed-$(MINOR)
GPU := .venv-gpu/installed-$(MINOR)

# Compiled programs and fetched data are kept here.
EQXLDM_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/eqxldm
export JAX_COMPILATION_CACHE_DIR ?= $(EQXLDM_CACHE)/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.5
# XLA:CPU allocates its temporaries anew for each step; huge pages make that 5 % faster (glibc).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

JOB = .venv/bin/python -m experiments.train
TABLES = .venv/bin/python -m experiments.train.tables
WORDS = .venv/bin/python -m experiments.words
CLIPS = .venv/bin/python -m experiments.video $(if $(SMOKE),--smoke,$(if $(LARGE),--large))
# Options as make variables. The prompt goes by the environment, as it can hold any character.
export PROMPT
export NEGATIVE
# A run folder of its own: RUN=runs/another.
FOLDER = $(if $(RUN),--run-dir "$(RUN)")
WHICH = $(if $(SPACE),--space $(SPACE)) $(if $(DENOISER),--denoiser $(DENOISER)) \
	$(if $(MODERN),--form modern) $(if $(FORM),--form $(FORM)) $(if $(OBJECTIVE),--objective $(OBJECTIVE))
PICTURES = $(if $(IMAGES),--images "$(IMAGES)") $(if $(TEST_IMAGES),--test-images "$(TEST_IMAGES)")
ON = $(if $(SIZE),--size $(SIZE)) $(if $(CHANNELS),--channels $(CHANNELS)) \
	$(if $(MESH),--mesh $(MESH)) $(if $(LPIPS),--lpips "$(LPIPS)")
WITH = $(FOLDER) $(WHICH) $(PICTURES) $(ON) $(if $(VAE),--vae "$(VAE)") $(if $(MODEL),--dit.model $(MODEL)) \
	$(if $(EVAL_EVERY),--eval-every $(EVAL_EVERY)) $(if $(FROM),--start-from "$(FROM)") \
	$(if $(TEXT_ENCODER),--text.tokens frozen --text-encoder "$(TEXT_ENCODER)") $(ARGS)
HOW = $(if $(N),--n $(N)) $(if $(STEPS),--steps $(STEPS)) $(if $(GUIDANCE),--guidance $(GUIDANCE)) \
	$(if $(SOLVER),--solver $(SOLVER))
SAMPLE = $(FOLDER) $(WHICH) $(if $(LABEL),--label $(LABEL)) $(if $(PROMPT),--prompt "$$PROMPT") $(HOW) \
	$(if $(SEED),--seed $(SEED)) $(if $(OUT),--out "$(OUT)") $(ARGS)
GENERATE = $(if $(MODEL),--model "$(MODEL)") $(if $(PROMPT),--prompt "$$PROMPT") \
	$(if $(NEGATIVE),--negative "$$NEGATIVE") $(if $(LABEL),--label "$(LABEL)") $(HOW) \
	$(if $(SEED),--seed $(SEED)) $(if $(SIZE),--size $(SIZE)) $(if $(INIT),--init "$(INIT)") \
	$(if $(FRAMES),--frames $(FRAMES)) $(if $(FPS),--fps $(FPS)) \
	$(if $(STRENGTH),--strength $(STRENGTH)) $(if $(MASK),--mask "$(MASK)") \
	$(if $(PREVIEW),--preview) $(if $(TAE),--tae "$(TAE)") $(if $(DTYPE),--dtype $(DTYPE)) \
	$(if $(LORA),--lora "$(LORA)") $(if $(LORA_SCALE),--lora-scale $(LORA_SCALE)) \
	$(if $(CLIP_SKIP),--clip-skip $(CLIP_SKIP)) $(if $(QUANTIZE),--quantize $(QUANTIZE)) \
	$(if $(MESH),--mesh $(MESH)) $(if $(OUT),--out "$(OUT)") $(if $(FROM),--repeat "$(FROM)") $(ARGS)
COMPARE = $(if $(SAMPLES),--samples "$(SAMPLES)") $(if $(REFERENCE),--reference "$(REFERENCE)") \
	$(if $(FEATURES),--features $(FEATURES)) $(if $(WEIGHTS),--weights "$(WEIGHTS)") \
	$(if $(RESIZING),--resizing $(RESIZING)) $(if $(SIZE),--size $(SIZE)) $(if $(N),--n $(N)) \
	$(if $(OUT),--out "$(OUT)") $(ARGS)
EVALUATE = $(FOLDER) $(WHICH) $(PICTURES) $(HOW) $(ARGS)
RUNS = --preset $(or $(PRESET),mnist) $(FOLDER) $(WHICH) $(HOW) $(ARGS)
IMAGENET = --preset $(if $(SMOKE),smoke,imagenet256)
RUN_OF_SOUND = $(or $(RUN),runs/sound$(if $(SMOKE),-smoke,$(if $(LARGE),-large)))
RUN_OF_CLIPS = $(if $(SOUND)$(CLIP)$(WAV),--run-dir "$(RUN_OF_SOUND)",$(FOLDER))
# Files that PyAV reads or writes (VIDEO_ENDINGS of eqxldm/data/clips.py), also as cameras name them.
ENDINGS := mp4 m4v mov webm mkv avi MP4 M4V MOV WEBM MKV AVI
OF_VIDEO = $(filter $(addprefix %.,$(ENDINGS)),$(FIRST) $(CLIP) $(OUT))
# A step of both towers costs twice that of clips alone.
SOUNDING = --sound $(if $(SMOKE)$(LARGE),,--diffusion.steps 3700)
OF_CLIPS = $(RUN_OF_CLIPS) $(if $(VIDEOS),--videos "$(VIDEOS)") $(if $(IMAGES),--images "$(IMAGES)") $(if $(SOUND),$(SOUNDING)) \
	$(if $(SIZE),--size $(SIZE)) \
	$(if $(CHANNELS),--channels $(CHANNELS)) $(if $(FRAMES),--frames $(FRAMES)) \
	$(if $(FPS),--fps $(FPS)) $(if $(MESH),--mesh $(MESH)) $(ARGS)
OF_SAMPLES = $(RUN_OF_CLIPS) $(if $(CLIP),--clip "$(CLIP)") \
	$(if $(WAV),--wav "$(WAV)") $(if $(PROMPT),--prompt "$$PROMPT") $(if $(FIRST),--first "$(FIRST)") \
	$(if $(FRAMES),--frames $(FRAMES)) $(HOW) $(if $(SEED),--seed $(SEED)) \
	$(if $(OUT),--out "$(OUT)") $(ARGS)
AOT = $(if $(SHORT),--short) $(if $(ONLY),--only '$(ONLY)') $(if $(UPDATE),--update) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help train sample evaluate train-mnist sample-mnist evaluate-mnist train-fashion-mnist \
	sample-fashion-mnist evaluate-fashion-mnist train-cifar10 sample-cifar10 evaluate-cifar10 \
	train-text sample-text evaluate-text compare-text compare-guidance compare-modern compare-few-steps \
	train-imagenet sample-imagenet evaluate-imagenet train-autoencoder generate generate-text \
	train-text-diffusion train-video sample-video serve compare-mnist export compare-quantized compare-faster \
	bench-solvers bench-mixture bench bench-accelerator bench-data bench-serve bench-quantized scaling tpu-check tpu-pieces \
	gpu-check test test-jobs test-parity test-soak test-soak-serve fuzz lint format typecheck pins docs docs-serve clean

##@ To train and to sample

help: ## list the targets
	@awk -F':.*## ' '/^##@ /{printf "\n%s\n", substr($$0, 5)} \
		/^[a-z0-9-]+:.*## /{printf "  make %-24s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  ARGS=\"...\" adds options: make train-mnist ARGS=\"--seed 1 --run-dir runs/one\""
	@echo "  $(JOB) train --help lists them."
	@echo "  RUN=runs/another: targets that train, sample and measure take another folder."
	@echo "  ACCELERATOR=cpu|cuda|tpu overrides the build of JAX (here: $(ACCELERATOR))"

train: $(RUNTIME) ## on your own pictures: IMAGES=folder SIZE="64 96" CHANNELS=1 EVAL_EVERY=500
	$(JOB) train --preset $(or $(PRESET),images) $(WITH)

sample: $(RUNTIME) ## from that run: PROMPT="a red boat" LABEL=7 N=16 STEPS=50 GUIDANCE=2.0 SEED=0
	$(JOB) sample --preset $(or $(PRESET),images) $(SAMPLE)

evaluate: $(RUNTIME) ## measure N samples of that run; or anyone's: SAMPLES=a.npz REFERENCE=b.npz FEATURES=inception WEIGHTS=file
	$(if $(SAMPLES)$(REFERENCE),.venv/bin/python -m experiments.evaluate $(COMPARE),\
		$(JOB) evaluate --preset $(or $(PRESET),images) $(EVALUATE))

train-mnist: $(RUNTIME) ## on MNIST, in ten minutes on two cores: DENOISER=unet SPACE=pixel MODERN=1 OBJECTIVE=imf FROM=runs/mnist
	$(JOB) train --preset mnist $(WITH)

sample-mnist: $(RUNTIME) ## LABEL=7 N=16 STEPS=50 GUIDANCE=2.0 SOLVER=ddim SEED=0 OUT=a.png
	$(JOB) sample --preset mnist $(SAMPLE)

evaluate-mnist: $(RUNTIME) ## measure 10,000 samples of the run, or N
	$(JOB) evaluate --preset mnist $(EVALUATE)

train-fashion-mnist: $(RUNTIME) ## the same on Fashion-MNIST
	$(JOB) train --preset fashion-mnist $(WITH)

sample-fashion-mnist: $(RUNTIME) ## as sample-mnist
	$(JOB) sample --preset fashion-mnist $(SAMPLE)

evaluate-fashion-mnist: $(RUNTIME) ## as evaluate-mnist
	$(JOB) evaluate --preset fashion-mnist $(EVALUATE)

train-cifar10: $(RUNTIME) ## 32 x 32 colour on two cores: IMAGES=folder TEST_IMAGES=folder
	$(JOB) train --preset cifar10 $(WITH)

sample-cifar10: $(RUNTIME) ## as sample-mnist
	$(JOB) sample --preset cifar10 $(SAMPLE)

evaluate-cifar10: $(RUNTIME) ## as evaluate-mnist
	$(JOB) evaluate --preset cifar10 $(EVALUATE)

train-text: $(WITH_TEXT) ## emoji in three styles from their captions (152 MB are fetched): TEXT_ENCODER=folder of a frozen one
	$(JOB) train --preset text $(WITH)

sample-text: $(WITH_TEXT) ## PROMPT="noto red apple", or twemoji or fluent; N=16 STEPS=25 GUIDANCE=2.5 SEED=0
	$(JOB) sample --preset text $(SAMPLE)

evaluate-text: $(WITH_TEXT) ## measure N samples of the run, of captions that were held out
	$(JOB) evaluate --preset text $(EVALUATE)

train-imagenet: $(RUNTIME) ## IMAGES=folder VAE=folder MODEL=dit_xl_2 MODERN=1 MESH=fsdp=8; FORM=jit SPACE=pixel; SMOKE=1 makes its own images
	$(JOB) train $(IMAGENET) $(WITH)

sample-imagenet: $(RUNTIME) ## LABEL=207 N=16 STEPS=250 GUIDANCE=4.0 SOLVER=ddpm SEED=0; SMOKE=1
	$(JOB) sample $(IMAGENET) $(SAMPLE)

evaluate-imagenet: $(RUNTIME) ## measure N samples of the run; SMOKE=1
	$(JOB) evaluate $(IMAGENET) $(EVALUATE)

train-autoencoder: $(RUNTIME) ## an autoencoder alone: IMAGES=folder LPIPS=folder PRESET=cifar10; SMOKE=1
	$(JOB) autoencoder $(if $(PRESET),--preset $(PRESET),$(IMAGENET)) $(FOLDER) $(PICTURES) \
		$(ON) $(ARGS)

generate: $(WITH_TEXT) ## published weights: MODEL=folder PROMPT="..." NEGATIVE= STEPS= GUIDANCE= SOLVER= INIT=a.png STRENGTH=0.6 MASK=b.png FRAMES=33 LORA=file QUANTIZE=int8; FROM=made.png
	.venv/bin/python -m experiments.generate $(GENERATE)

train-text-diffusion: $(RUNTIME) ## words: a masked diffusion model beside an autoregressive twin: TEXT=file
	$(WORDS) train $(FOLDER) $(if $(TEXT),--text "$(TEXT)") $(if $(MESH),--mesh $(MESH)) $(ARGS)

generate-text: $(RUNTIME) ## write with that run, or a folder of LLaDA: MODEL=folder PROMPT="in the" OUT=a.html
	$(WORDS) generate $(if $(MODEL)$(RUN),--model "$(or $(MODEL),$(RUN))") $(if $(PROMPT),--prompt "$$PROMPT") \
		$(if $(MESH),--mesh $(MESH)) $(if $(OUT),--out "$(OUT)") $(ARGS)

serve: $(SERVE) ## over HTTP, with a page: RUN=runs/mnist or runs/words, or MODEL=folder; PORT=8000 HOST=127.0.0.1
	.venv/bin/python -m experiments.serve serve $(if $(RUN),--run "$(RUN)") \
		$(if $(MODEL),--model "$(MODEL)") $(if $(SIZE),--size $(SIZE)) $(if $(DTYPE),--dtype $(DTYPE)) \
		$(if $(PORT),--port $(PORT)) $(if $(HOST),--host $(HOST)) $(ARGS)

train-video: $(WITH_TEXT) $(if $(VIDEOS),$(VIDEO)) ## clips of digits that bounce, from their captions; or VIDEOS=folder IMAGES=folder FRAMES=17 SIZE="64 64" FPS=8 RUN=runs/clips; SOUND=1; LARGE=1 on a GPU or TPU; SMOKE=1
	$(CLIPS) train $(OF_CLIPS)

sample-video: $(WITH_TEXT) $(if $(OF_VIDEO),$(VIDEO)) ## PROMPT="a 3 moving up and a 7 moving left" FIRST=a.png FRAMES=41 N=8 STEPS=20 OUT=a.gif; SOUND=1 CLIP=a.mp4 or WAV=a.wav; LARGE=1; SMOKE=1
	$(CLIPS) sample $(OF_SAMPLES)

compare-mnist: $(RUNTIME) ## the comparison behind the defaults of MNIST's DiT (20 minutes)
	.venv/bin/python -m experiments.train.compare $(ARGS)

compare-guidance: $(RUNTIME) ## a fixed guidance scale beside three that change over time, of RUN=runs/fashion-mnist
	for schedule in fixed linear cosine bounded; do echo "$$schedule:"; \
		$(JOB) evaluate --preset fashion-mnist \
		--guidance-schedule $$schedule $(EVALUATE) || exit; done

compare-text: $(WITH_TEXT) ## captions as joint tokens, by cross-attention and (TEXT_ENCODER=folder) by a frozen encoder
	.venv/bin/python -m experiments.train.compare --preset text \
		$(if $(TEXT_ENCODER),--text-encoder "$(TEXT_ENCODER)") $(ARGS)

compare-modern: $(RUNTIME) ## each newer addition to DiT, alone and together, on CIFAR-10's latents: IMAGES=folder TEST_IMAGES=folder
	$(TABLES) modern $(PICTURES) $(ARGS)

compare-few-steps: $(RUNTIME) ## objectives by network calls, on the same latents: IMAGES=folder TEST_IMAGES=folder
	$(TABLES) few-steps $(PICTURES) $(ARGS)

export: $(if $(filter onnx,$(FORMAT)),$(ONNX),$(RUNTIME)) ## a run as a file for other programs: RUN=runs/mnist FORMAT=jax|onnx QUANTIZE=int8 OUT=a.bundle
	.venv/bin/python -m experiments.export $(if $(FORMAT),--format $(FORMAT)) \
		$(if $(QUANTIZE),--quantize $(QUANTIZE)) $(if $(OUT),--out "$(OUT)") $(RUNS)

compare-quantized: $(RUNTIME) ## weights in 8 bits beside the run: errors, FD, bytes, times: RUN=runs/mnist N=2000
	.venv/bin/python -m experiments.export.compare --what quantized $(RUNS)

compare-faster: $(RUNTIME) ## cheaper steps without training beside the run: RUN=runs/mnist N=2000 STEPS=20
	.venv/bin/python -m experiments.export.compare --what faster $(RUNS)

docs: $(DOCS) ## build the documentation into site/, warnings as errors
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

docs-serve: $(DOCS) ## show the documentation at http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs serve

clean: ## delete the environment and all caches of the folder; runs/ stays
	rm -rf .venv .venv-parity .venv-tpu .venv-gpu .pytest_cache .hypothesis .ruff_cache .jax_cache .docs_cache site dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

##@ To develop

bench-solvers: $(RUNTIME) ## what each solver costs beside the network, in passes over the state
	.venv/bin/python benchmarks/solvers.py

bench-mixture: $(RUNTIME) ## every solver's error against the exact solution (2 minutes)
	.venv/bin/python benchmarks/mixture.py

bench: $(PARITY) ## ours beside PyTorch: training, sampling, compile time (15 minutes)
	.venv-parity/bin/python benchmarks/models.py $(ARGS)

bench-accelerator: $(RUNTIME) ## training and sampling on a GPU or TPU in many variants; small on a CPU
	.venv/bin/python benchmarks/accelerator.py $(ARGS)

bench-serve: $(SERVE) $(if $(WITH_DIFFUSERS),$(PARITY)) ## the server over loopback, beside the bare jitted call: RUN=runs/mnist or MODEL=folder; WITH_DIFFUSERS=1 (2 minutes)
	.venv/bin/python -m experiments.serve bench $(if $(MODEL),--model "$(MODEL)", \
		$(if $(RUN),--run "$(RUN)",$(if $(WITH_DIFFUSERS),,--run runs/mnist))) \
		$(if $(WITH_DIFFUSERS),--diffusers .venv-parity/bin/python) \
		$(if $(STEPS),--steps $(STEPS)) $(if $(SOLVER),--solver $(SOLVER)) $(ARGS)

bench-quantized: $(RUNTIME) ## one layer with weights in 8 bits beside bfloat16's: times and errors
	.venv/bin/python benchmarks/quantized_layers.py

bench-data: $(RUNTIME) ## latents read and images decoded a second, beside the goals (1 minute)
	.venv/bin/python benchmarks/data.py

scaling: $(RUNTIME) ## memory on every mesh, FLOPs and network bytes of a step: counted
	.venv/bin/python benchmarks/scaling.py

tpu-check: $(TPU) ## compile the presets for TPU slices, without a TPU: SHORT=1 ONLY=v5e UPDATE=1
	.venv-tpu/bin/python -m benchmarks.aot.check tpu $(AOT)

tpu-pieces: $(TPU) ## blocks of the models, each compiled for one TPU chip in seconds
	.venv-tpu/bin/python -m benchmarks.aot.pieces $(ARGS)

gpu-check: $(GPU) ## the same for H100 and H200, without a GPU (4.4 GB are installed)
	.venv-gpu/bin/python -m benchmarks.aot.check gpu $(AOT)

PYTEST = .venv/bin/python -m pytest -n $(or $(WORKERS),auto) --dist loadfile --no-loadscope-reorder

test: $(DEV) ## run the tests of the library and of the jobs' parts
	$(PYTEST) --ignore tests/jobs $(ARGS)

test-jobs: $(DEV) ## run whole small jobs: trained, killed and resumed, on two processes and eight devices
	$(PYTEST) tests/jobs $(ARGS)

test-parity: $(PARITY) ## compare with torch and diffusers, run live: SEED=0 for other networks
	.venv-parity/bin/python -m pytest -n $(or $(WORKERS),auto) tests/parity $(ARGS)

test-soak: $(DEV) ## kill a run KILLS=20 times, fill its disk FAULTS=10 times, compare with one left alone
	.venv/bin/python tests/soak.py --kills $(or $(KILLS),20) --faults $(or $(FAULTS),10)

test-soak-serve: $(SERVE) ## REQUESTS=10000, too many at once, killed and started again: RUN=runs/mnist
	.venv/bin/python -m experiments.serve soak --run "$(or $(RUN),runs/mnist)" \
		$(if $(REQUESTS),--requests $(REQUESTS)) $(ARGS)

fuzz: $(DEV) ## feed every reader of outside bytes CASES=1000 damaged inputs
	EQXLDM_FUZZ_CASES=$(or $(CASES),1000) .venv/bin/python -m pytest \
		tests/test_fuzz.py tests/test_fuzz_models.py tests/test_fuzz_jobs.py $(ARGS)

lint: $(DEV) ## check style and format
	.venv/bin/ruff check
	.venv/bin/ruff format --check

format: $(DEV) ## fix style and format
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

typecheck: $(DEV) ## check types
	.venv/bin/pyright

pins: $(RUNTIME) ## renew constraints/, with hashes: the newest versions that fit pyproject.toml
	$(PYTHON) -m venv .venv/uv && .venv/uv/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv/bin/python constraints/pins.py renew .venv/uv/bin/uv $(ARGS)

.venv/bin/python .venv-parity/bin/python .venv-tpu/bin/python .venv-gpu/bin/python: %/bin/python:
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3."; exit 1; }
	$(PYTHON) -m venv $* || \
		{ rm -rf $*; echo "Python's venv is missing (Debian: apt install python3-venv)."; exit 1; }

# What an environment needs, each file by one of its hashes; then this package, built by what is pinned.
INSTALL = $(1)/bin/python constraints/pins.py select $(CONSTRAINTS) build runtime $(2) > $(1)/pins.txt && \
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes --no-deps --requirement $(1)/pins.txt && \
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation --editable .

$(RUNTIME): .venv/bin/python pyproject.toml $(CONSTRAINTS)
	$(call INSTALL,.venv,$(ACCELERATOR_EXTRA))
	@touch $@

$(WITH_TEXT): $(RUNTIME)
	$(call INSTALL,.venv,text $(ACCELERATOR_EXTRA))
	@touch $@

$(ONNX): $(RUNTIME)
	$(call INSTALL,.venv,onnx $(ACCELERATOR_EXTRA))
	@touch $@

$(SERVE): $(RUNTIME)
	$(call INSTALL,.venv,serve text $(ACCELERATOR_EXTRA))
	@touch $@

$(VIDEO): $(RUNTIME)
	$(call INSTALL,.venv,video $(ACCELERATOR_EXTRA))
	@touch $@

$(DEV): $(RUNTIME)
	$(call INSTALL,.venv,dev $(ACCELERATOR_EXTRA))
	@touch $@

$(DOCS): $(RUNTIME)
	$(call INSTALL,.venv,docs text $(ACCELERATOR_EXTRA))
	@touch $@

# On the CPU, whatever the machine has: the build of torch is the one that pip's settings give, and
# so has no hash here. Of open-clip-torch only the vocabulary file of CLIP is read, of torch-fidelity
# its statistics and networks are run: what they depend on besides is not installed.
$(PARITY): .venv-parity/bin/python pyproject.toml $(CONSTRAINTS) constraints/parity.txt
	$(call INSTALL,.venv-parity,text onnx serve)
	.venv-parity/bin/python constraints/pins.py versions $(CONSTRAINTS) > .venv-parity/versions.txt
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint .venv-parity/versions.txt --constraint constraints/parity.txt \
		torch diffusers transformers peft hypothesis pytest pytest-xdist
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--constraint constraints/parity.txt open-clip-torch torch-fidelity
	@touch $@

$(TPU) $(GPU): .venv-%/installed-$(MINOR): .venv-%/bin/python pyproject.toml $(CONSTRAINTS)
	$(call INSTALL,.venv-$*,$(if $(filter tpu,$*),tpu,cuda))
	@touch $@
