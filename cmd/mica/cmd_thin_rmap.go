package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"mica/thin"
)

func newThinRmapCmd() *cobra.Command {
	var p poolFlags
	var regions []string
	var asJSON bool
	c := &cobra.Command{
		Use:   "rmap POOL --region BEGIN..END",
		Short: "Say which thin devices map given blocks of the data device",
		Long: `Say which thin devices map given blocks of the data device: what a range of bad sectors of the
disk holds. BEGIN and END are data blocks, counted in the pool's block size; END is one behind
the last. Each line names a run of data blocks, the device and its blocks, as thin_rmap does:

    data 100..103 -> thin(7) 40..43

Blocks that devices share come once for each device.`,
		Example: `  mica thin rmap /var/lib/mica/pool --region 100..200
  mica thin rmap --metadata /dev/sdc --region 0..64 --region 4096..4097 --json`,
		Args: p.metaArgs(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(regions) == 0 {
				return usagef("give at least one --region BEGIN..END")
			}
			var runs []thin.DataRun
			for _, r := range regions {
				run, err := parseRegion(r)
				if err != nil {
					return err
				}
				runs = append(runs, run)
			}
			d, err := p.metadataDevice(cmd.Context(), args, true)
			if err != nil {
				return err
			}
			defer d.Close()
			v, err := thin.OpenView(d)
			if err != nil {
				return p.about(args, err)
			}
			if !asJSON {
				return p.about(args, v.WriteRmap(cmd.OutOrStdout(), runs, thin.RmapOptions{}))
			}
			type line struct {
				Data   thin.DataBlock `json:"data_begin"`
				Len    uint64         `json:"length"`
				Device thin.DevID     `json:"device"`
				VBegin thin.VBlock    `json:"begin"`
			}
			lines := []line{}
			if err := v.Rmap(runs, thin.RmapOptions{}, func(r thin.RmapRange) error {
				lines = append(lines, line{r.Begin, r.Len, r.Device, r.VBegin})
				return nil
			}); err != nil {
				return p.about(args, err)
			}
			return printJSON(cmd.OutOrStdout(), struct {
				BlockSize int64  `json:"block_size"`
				Ranges    []line `json:"ranges"`
			}{v.DataBlockSize(), lines})
		},
	}
	p.addMeta(c)
	jsonFlag(c, &asJSON)
	c.Flags().StringArrayVar(&regions, "region", nil, "data blocks to look for, `BEGIN..END`; may be given more than once")
	return c
}

// parseRegion reads BEGIN..END.
func parseRegion(s string) (thin.DataRun, error) {
	b, e, ok := strings.Cut(s, "..")
	begin, err := strconv.ParseUint(b, 10, 64)
	end, err2 := strconv.ParseUint(e, 10, 64)
	if !ok || err != nil || err2 != nil || end <= begin {
		return thin.DataRun{}, usageError{fmt.Errorf("%q is not a region: want BEGIN..END, two numbers of data blocks, END behind BEGIN", s)}
	}
	return thin.DataRun{Begin: thin.DataBlock(begin), Len: end - begin}, nil
}
