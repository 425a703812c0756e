package nbd

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"mica/dev"
)

// BenchmarkRequests keeps depth requests of one size in flight on one connection. The client is
// a goroutine that sends and one that counts bytes, so that it costs little beside the server.
func BenchmarkRequests(b *testing.B) {
	const size = 256 << 20
	dir := medium(b)
	f, err := dev.CreateFile(filepath.Join(dir, "disk"), size, dev.OpenOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(pattern(1, 4<<20), 0); err != nil {
		b.Fatal(err)
	}
	for _, c := range []struct {
		op    string
		bs    int
		depth int
	}{
		{"read", 4096, 1}, {"read", 4096, 16}, {"write", 4096, 1}, {"write", 4096, 16},
		{"read", 64 << 10, 4}, {"write", 64 << 10, 4}, {"read", 1 << 20, 4}, {"write", 1 << 20, 4},
	} {
		b.Run(fmt.Sprintf("op=%s/bs=%dKiB/qd=%d", c.op, c.bs>>10, c.depth), func(b *testing.B) {
			_, cl := serveDevice(b, f, ExportOptions{}, true, false)
			cl.nc.SetDeadline(time.Time{})
			cmd, answer := uint16(cmdWrite), simpleSize
			var payload []byte
			if c.op == "read" {
				cmd = cmdRead
				answer = (c.bs+pieceSize-1)/pieceSize*dataChunkSize + c.bs
			} else {
				payload = make([]byte, c.bs)
			}
			b.SetBytes(int64(c.bs))
			b.ReportAllocs()
			b.ResetTimer()
			msg := rawRequest(0, cmd, 0, 0, uint32(c.bs), payload)
			if err := pump(cl.nc, b.N, c.depth, answer, func(i int) []byte {
				binary.BigEndian.PutUint64(msg[16:], uint64(i*7919)%(4<<20/uint64(c.bs))*uint64(c.bs))
				return msg
			}); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// pump sends n requests, depth of them in flight, and reads answer bytes for each.
func pump(nc net.Conn, n, depth, answer int, request func(i int) []byte) error {
	slots := make(chan struct{}, depth)
	done := make(chan error, 1)
	go func() {
		buf := make([]byte, 1<<20)
		for got := 0; got < n*answer; {
			k, err := nc.Read(buf[:min(len(buf), n*answer-got)])
			if err != nil {
				done <- err
				return
			}
			for i := got / answer; i < (got+k)/answer; i++ {
				<-slots
			}
			got += k
		}
		done <- nil
	}()
	for i := range n {
		select {
		case slots <- struct{}{}:
		case err := <-done:
			return err
		}
		if _, err := nc.Write(request(i)); err != nil {
			return err
		}
	}
	return <-done
}

// BenchmarkFio runs fio's nbd engine against this server and against nbdkit's file plugin, one
// after the other in every iteration, on one file in memory:
//
//	go test -run xxx -bench Fio -benchtime 5x
//
// It reports both and the ratio of the medians. Figures of a busy machine mean little; the
// ratio less than most.
func BenchmarkFio(b *testing.B) {
	for _, name := range []string{"fio", "nbdkit"} {
		if _, err := exec.LookPath(name); err != nil {
			b.Skipf("%s is not installed", name)
		}
	}
	const size = 1 << 30
	dir := medium(b)
	path := filepath.Join(dir, "disk")
	f, err := dev.CreateFile(path, size, dev.OpenOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	chunk := pattern(1, 1<<20)
	for off := int64(0); off < size; off += int64(len(chunk)) {
		if _, err := f.WriteAt(chunk, off); err != nil {
			b.Fatal(err)
		}
	}
	s, _ := startServer(b, Options{})
	if err := s.AddExport("disk", f, ExportOptions{}); err != nil {
		b.Fatal(err)
	}
	kitSocket := filepath.Join(dir, "kit")
	kit := exec.Command("nbdkit", "-f", "-U", kitSocket, "file", path)
	if err := kit.Start(); err != nil {
		b.Fatal(err)
	}
	defer kit.Wait()
	defer kit.Process.Signal(os.Interrupt)
	for i := 0; ; i++ {
		if c, err := net.Dial("unix", kitSocket); err == nil {
			c.Close()
			break
		}
		if i > 500 {
			b.Fatal("nbdkit does not answer")
		}
		time.Sleep(10 * time.Millisecond)
	}
	uris := []string{s.URI("disk"), "nbd+unix:///?socket=" + kitSocket}
	for _, c := range []struct {
		op, rw, bs string
		depth      int
	}{
		{"read", "randread", "4k", 16}, {"write", "randwrite", "4k", 16}, {"read", "read", "1M", 4}, {"write", "write", "1M", 4},
	} {
		b.Run(fmt.Sprintf("op=%s/bs=%s/qd=%d", c.op, c.bs, c.depth), func(b *testing.B) {
			var iops [2][]float64
			for i := range b.N {
				for k := range uris {
					k = (k + i) % 2
					iops[k] = append(iops[k], fioIOPS(b, uris[k], c.rw, c.bs, c.depth))
				}
			}
			own, other := median(iops[0]), median(iops[1])
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(own, "iops")
			b.ReportMetric(other, "nbdkit-iops")
			b.ReportMetric(own/other, "ratio")
		})
	}
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// fioIOPS is one second of fio.
func fioIOPS(b *testing.B, uri, rw, bs string, depth int) float64 {
	out, err := exec.Command("fio", "--name=x", "--ioengine=nbd", "--uri="+uri, "--rw="+rw, "--bs="+bs, fmt.Sprint("--iodepth=", depth),
		"--time_based", "--runtime=1", "--size=1G", "--norandommap", "--output-format=json").Output()
	if err != nil {
		b.Fatalf("fio: %v\n%s", err, out)
	}
	var res struct {
		Jobs []struct{ Read, Write struct{ IOPS float64 } }
	}
	if err := json.Unmarshal(out[bytes.IndexByte(out, '{'):], &res); err != nil {
		b.Fatal(err)
	}
	return max(res.Jobs[0].Read.IOPS, res.Jobs[0].Write.IOPS)
}
