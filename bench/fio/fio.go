// Package fio runs fio as a load generator and reads what it has measured.
package fio

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strconv"
	"time"
)

// A Job is one kind of load on one target.
type Job struct {
	Engine string // "nbd" (Target is a URI), "libaio", "psync"
	Target string // URI, file or block device
	RW     string // "randread", "randwrite", "read", "write"
	Block  int    // bytes of a request
	Depth  int    // requests in flight, of each job; 0 is 1
	Jobs   int    // processes (with nbd: connections); 0 is 1
	Size   int64  // bytes of the target that are used
	Offset int64  // where they begin

	// Runtime makes the job run that long; requests may then hit the same place again. Otherwise
	// it ends after Count requests, or when each place was hit once.
	Runtime time.Duration
	Count   int

	Direct bool
	Fsync  int // fsync after so many writes
	Name   string
	Extra  []string // further options of fio
}

// Figures are what a job came to, its processes taken together.
type Figures struct {
	IOPS        float64
	BytesPerSec float64
	Requests    int64
	Seconds     float64
	P50, P99    time.Duration // of requests, from submission to completion
	SyncP50     time.Duration // of fsync
	SyncP99     time.Duration
}

// args are the command line of jobs that run at the same time.
func args(jobs []Job) []string {
	a := []string{"--output-format=json", "--eta=never", "--group_reporting=1"}
	for i, j := range jobs {
		name := j.Name
		if name == "" {
			name = "job" + strconv.Itoa(i)
		}
		a = append(a, "--name="+name, "--ioengine="+j.Engine, "--rw="+j.RW, "--bs="+strconv.Itoa(j.Block),
			"--iodepth="+strconv.Itoa(max(1, j.Depth)), "--numjobs="+strconv.Itoa(max(1, j.Jobs)),
			"--offset="+strconv.FormatInt(j.Offset, 10), "--size="+strconv.FormatInt(j.Size, 10), "--new_group", "--thread=1",
			"--randrepeat=1", "--refill_buffers=0")
		if j.Engine == "nbd" {
			a = append(a, "--uri="+j.Target)
		} else {
			a = append(a, "--filename="+j.Target, "--allow_file_create=0")
		}
		if j.Runtime > 0 {
			a = append(a, "--time_based=1", "--norandommap=1", fmt.Sprintf("--runtime=%dms", j.Runtime.Milliseconds()))
		}
		if j.Count > 0 {
			a = append(a, "--number_ios="+strconv.Itoa(j.Count))
		}
		if j.Direct {
			a = append(a, "--direct=1")
		}
		if j.Fsync > 0 {
			a = append(a, "--fsync="+strconv.Itoa(j.Fsync))
		}
		a = append(a, j.Extra...)
	}
	return a
}

// Run runs jobs at the same time and returns the figures of each.
func Run(ctx context.Context, jobs ...Job) ([]Figures, error) {
	c := exec.CommandContext(ctx, "fio", args(jobs)...)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("fio: %w: %s", err, bytes.TrimSpace(append(tail(stderr.Bytes()), messages(out)...)))
	}
	return parse(out, len(jobs))
}

// messages is what fio printed before its JSON.
func messages(out []byte) []byte {
	before, _, _ := bytes.Cut(out, []byte("{"))
	return tail(before)
}

func tail(b []byte) []byte { return b[max(0, len(b)-1000):] }

type side struct {
	IOPS    float64 `json:"iops"`
	BW      float64 `json:"bw_bytes"`
	Total   int64   `json:"total_ios"`
	Runtime float64 `json:"runtime"` // ms
	Lat     latency `json:"clat_ns"`
}

type latency struct {
	Percentile map[string]float64 `json:"percentile"`
}

func (l latency) at(p string) time.Duration { return time.Duration(l.Percentile[p]) }

// parse reads fio's JSON; it prints warnings before it on some systems.
func parse(out []byte, want int) ([]Figures, error) {
	i := bytes.IndexByte(out, '{')
	if i < 0 {
		return nil, fmt.Errorf("fio printed no JSON: %s", tail(out))
	}
	var doc struct {
		Jobs []struct {
			Error int  `json:"error"`
			Read  side `json:"read"`
			Write side `json:"write"`
			Sync  struct {
				Lat latency `json:"lat_ns"`
			} `json:"sync"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out[i:], &doc); err != nil {
		return nil, fmt.Errorf("fio's JSON: %w", err)
	}
	if len(doc.Jobs) != want {
		return nil, fmt.Errorf("fio reported %d groups of jobs, want %d", len(doc.Jobs), want)
	}
	var all []Figures
	for i, j := range doc.Jobs {
		if j.Error != 0 {
			return nil, fmt.Errorf("fio: job %d failed with error %d", i, j.Error)
		}
		s := j.Read
		if j.Write.Total > s.Total {
			s = j.Write
		}
		if s.Total == 0 {
			return nil, fmt.Errorf("fio: job %d made no request", i)
		}
		all = append(all, Figures{
			IOPS: s.IOPS, BytesPerSec: s.BW, Requests: s.Total, Seconds: s.Runtime / 1000,
			P50: s.Lat.at("50.000000"), P99: s.Lat.at("99.000000"),
			SyncP50: j.Sync.Lat.at("50.000000"), SyncP99: j.Sync.Lat.at("99.000000"),
		})
	}
	return all, nil
}
