package layer

import (
	"context"
	"slices"
	"strings"
)

// snapContainers lists active snapshots as if they were containers, for those who ask for what
// others own: their names are OWNER/NAME. They can be looked at, not changed.
func (s *Store) snapContainers(ctx context.Context, f Filter) ([]Container, error) {
	if f.Image != "" || f.Owner != "*" && !strings.HasPrefix(f.Owner, ownerSnaps) {
		return nil, nil
	}
	var recs []record[snapBody]
	err := list(s, kindSnap, "", "", func(r record[snapBody]) (bool, error) {
		name := ownerSnaps + r.Key
		if r.body.Kind == SnapActive && strings.HasPrefix(name, f.Prefix) && name > f.Cursor && f.match(r.body.Owner, r.body.Labels, "") {
			recs = append(recs, r)
		}
		return f.Limit == 0 || len(recs) < f.Limit, ctx.Err()
	})
	var out []Container
	for _, r := range recs {
		b := r.body
		c := Container{Name: ownerSnaps + r.Key, ID: b.ID, ChainID: b.ParentName, Device: r.Device, SizeBytes: b.SizeBytes, FSType: b.FSType,
			Owner: b.Owner, Labels: b.Labels, Created: b.Created, GuestOwned: b.GuestOwned, Broken: s.cat.Broken(r.Ref())}
		l := s.liveOf(b.ID)
		c.UsedBytes = s.ownBytes(r.Record, b.deviceBody, l)
		if l != nil && l.a != nil && !l.dead.Load() {
			c.Attachment = &Attachment{As: AsBlock, ID: b.ID, Node: l.a.Node(), Link: l.a.Link(), FSType: b.FSType,
				MountOptions: s.mountOptions(b.FSType, false)}
		}
		out = append(out, c)
	}
	return out, err
}

// mergeContainers merges two lists in the order of their names.
func mergeContainers(a, b []Container, limit int) []Container {
	if len(b) == 0 {
		return a
	}
	out := append(slices.Clone(a), b...)
	slices.SortStableFunc(out, func(x, y Container) int { return strings.Compare(x.Name, y.Name) })
	if limit > 0 && len(out) > limit {
		out = out[:limit]
	}
	return out
}
