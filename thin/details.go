package thin

import "encoding/binary"

// Device details: a value of 24 bytes in the details tree, keyed by device id.
//
//	offset  size  field
//	0       8     mapped_blocks
//	8       8     transaction_id
//	16      4     creation_time
//	20      4     snapshotted_time
//
// Source: format description, section 3.3.
const detailsSize = 24

func (d Details) encode(b []byte) {
	binary.LittleEndian.PutUint64(b, d.MappedBlocks)
	binary.LittleEndian.PutUint64(b[8:], d.TransactionID)
	binary.LittleEndian.PutUint32(b[16:], d.CreationTime)
	binary.LittleEndian.PutUint32(b[20:], d.SnapshottedTime)
}

func decodeDetails(b []byte) Details {
	return Details{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:]),
		binary.LittleEndian.Uint32(b[16:]), binary.LittleEndian.Uint32(b[20:])}
}

// DetailsSize is the length of an encoded Details in bytes.
const DetailsSize = detailsSize

// DecodeDetails reads the value of the details tree; b has at least DetailsSize bytes.
func DecodeDetails(b []byte) Details { return decodeDetails(b) }
