# make demo    the whole job on a real image, on this machine (make undemo takes it away again)
# make test    every test: root, FUSE, loop, NBD, and a real kernel in an emulator
# Both install what they need (scripts/setup.sh --list says what that is).

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
GO ?= go
BIN := bin/mica
# Two packages at a time: tests with loop devices, FUSE and emulators do not gain from more.
TESTFLAGS := -p 2 -count=1 -timeout 60m
PACKAGES ?= ./...

.PHONY: all build demo undemo test test-containerd2 race fuzz-short bench microbench lint man setup clean

all: build

# A static binary. Without cmd/mica (a partial checkout) there is nothing to build.
build:
	@if [ -d cmd/mica ]; then CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN) ./cmd/mica && echo "built $(BIN)"; \
	else echo "no cmd/mica here: nothing to build"; fi

setup:
	@scripts/setup.sh

demo:
	@scripts/setup.sh build runtime
	@$(MAKE) --no-print-directory build
	@demo/demo.sh

undemo:
	@demo/undemo.sh

test: setup build
	@$(GO) vet $(PACKAGES)
	@$(GO) build -o bin/testsum ./internal/cmd/testsum
	@$(GO) test -json $(TESTFLAGS) $(PACKAGES) 2>&1 | bin/testsum

# The tests with containers once more, also with containerd 2.x, which Debian 12 does not have: it is built
# from its module first (some minutes, once).
test-containerd2: setup build
	@$(GO) build -o bin/testsum ./internal/cmd/testsum
	@dir=$$(scripts/containerd2.sh) && MICA_CONTAINERD=$$dir $(GO) test -json $(TESTFLAGS) ./test/containerd 2>&1 | bin/testsum

# The race detector needs cgo. The emulator's tests gain nothing from it.
race: setup
	@$(GO) build -o bin/testsum ./internal/cmd/testsum
	@CGO_ENABLED=1 $(GO) test -race -json $(TESTFLAGS) $$($(GO) list $(PACKAGES) | grep -v -e /test/kernel -e /internal/vm$$) 2>&1 | bin/testsum

fuzz-short:
	@scripts/fuzz-short.sh $(FUZZTIME)

# mica beside its peers: tables on the terminal, and JSON, a page and drawings in BENCHOUT. cgo is for
# the btrfs snapshotter of containerd, a peer. BENCHFLAGS="--only nbd --quick" and the like; BENCHVM= leaves
# the kernel with dm-thin and ublk in an emulator out.
BENCHOUT ?= bench-results
BENCHVM ?= yes
bench:
	@scripts/setup.sh build runtime bench $(if $(BENCHVM),vm)
	@CGO_ENABLED=1 $(GO) build -trimpath -o bin/mica-bench ./cmd/mica
	@mkdir -p $(BENCHOUT) && rm -f $(BENCHOUT)/vm.json
	@$(if $(BENCHVM),$(GO) run ./internal/cmd/benchvm -o $(BENCHOUT)/vm.json || echo "bench: the part in the emulator is left out" >&2)
	@bin/mica-bench bench --out $(BENCHOUT) $$([ ! -f $(BENCHOUT)/vm.json ] || echo --with $(BENCHOUT)/vm.json) $(BENCHFLAGS)

# The benchmarks beside the code, in the form that benchstat reads. A look at a part of them:
# make microbench PACKAGES=./engine/user BENCH=Flush BENCHTIME=100ms; to compare two states: BENCHCOUNT=10.
BENCH ?= .
BENCHTIME ?= 1s
BENCHCOUNT ?= 1
microbench:
	@$(GO) test -run '^$$' -bench '$(BENCH)' -benchtime $(BENCHTIME) -count $(BENCHCOUNT) -benchmem -timeout 60m -p 1 $(PACKAGES)

lint:
	@out=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$out" ] || { echo "not formatted:"; echo "$$out"; exit 1; }
	@$(GO) vet ./... && $(GO) vet -tags guest ./internal/dmioctl ./engine/kernel ./lvm
	@$(GO) test -count=1 ./internal/lint
	@for f in scripts/*.sh demo/*.sh .ci/run; do [ ! -f $$f ] || bash -n $$f || exit 1; done

man: build
	@$(BIN) man bin/man && ls bin/man

clean:
	rm -rf bin
