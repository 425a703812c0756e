package daemon

import (
	"net"
	"os"
)

// notify tells the service manager about a state ("READY=1"), as sd_notify does: one datagram to
// the socket in NOTIFY_SOCKET. Without that variable it does nothing.
func notify(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte(state))
	return err
}
