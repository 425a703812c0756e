package nbd

import (
	"encoding/binary"
	"fmt"
	"net"
	"path/filepath"
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
