package kernel

import (
	"mica/dev"
	"mica/engine/user"
	"mica/internal/crossing"
)

// A userPool is the user engine on the files of the rig.
type userPool struct{ crossing.EnginePool }

func openUserPool(dataPath, metaPath string) (*userPool, error) {
	data, err := dev.OpenFile(dataPath, dev.OpenOptions{Lock: true})
	if err != nil {
		return nil, err
	}
	meta, err := dev.OpenFile(metaPath, dev.OpenOptions{Lock: true})
	if err != nil {
		data.Close()
		return nil, err
	}
	p, err := user.New(meta, data, user.Options{ErrorIfNoSpace: true})
	if err != nil {
		return nil, err
	}
	return &userPool{crossing.EnginePool{Pool: p}}, nil
}
